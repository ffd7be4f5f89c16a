"""What an evaluation has to compute, in an order that is the same on every actor, and the computing of a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crem.config import EvaluateConfig
from pipelines.evaluation.answers import GivenAnswers, chosen_questions
from pipelines.evaluation.retrieval import retrieval_set
from pipelines.tables.prepared import PreparedRows, item_of

if TYPE_CHECKING:
    import crem

__all__ = ["Task", "TaskResults", "compute", "evaluation_tasks"]


@dataclass(frozen=True)
class Task:
    """Embed one side of a row, or answer the question of the row."""

    row: int
    side: str
    """``query`` or ``target``"""
    is_question: bool


@dataclass(frozen=True)
class TaskResults:
    """Results of consecutive tasks."""

    fingerprint: str
    """of the model that computed them"""
    embeddings: NDArray[np.float32]
    """[contents, D], in the order of the tasks"""
    answers: list[GivenAnswers]
    """in the order of the tasks"""

    @classmethod
    def joined(cls, parts: Sequence[TaskResults]) -> TaskResults:
        """The results of several parts, in their order."""
        return cls(
            parts[0].fingerprint,
            np.concatenate([part.embeddings for part in parts]),
            [answers for part in parts for answers in part.answers],
        )


def evaluation_tasks(rows: PreparedRows, config: EvaluateConfig) -> list[Task]:
    """All distinct contents to embed, then the questions to answer."""
    contents = [Task(row, side, is_question=False) for row, side in retrieval_set(rows).contents]
    return contents + [Task(row, "query", is_question=True) for row in chosen_questions(rows, config.max_answers)]


def compute(model: crem.Crem, rows: PreparedRows, tasks: Sequence[Task], config: EvaluateConfig) -> TaskResults:
    """Embed the contents and answer the questions among ``tasks``, in both modes where the model has chorus tokens."""
    items = [item_of(rows.table.column(task.side)[task.row].as_py(), rows.image) for task in tasks]
    contents = [item for item, task in zip(items, tasks, strict=True) if not task.is_question]
    queries = [item for item, task in zip(items, tasks, strict=True) if task.is_question]
    prompts = [rows.table.column("question")[task.row].as_py() for task in tasks if task.is_question]
    embeddings = model.embed(contents, batch_size=config.batch_size)
    options = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    native = model.answer(queries, prompts, compressed=False, **options)
    answers = [GivenAnswers(answer.text, answer.cache_bytes) for answer in native]
    if model.chorus_tokens:
        compressed = model.answer(queries, prompts, compressed=True, **options)
        answers = [
            replace(answer, compressed=c.text, compressed_bytes=c.cache_bytes)
            for answer, c in zip(answers, compressed, strict=True)
        ]
    return TaskResults(model.fingerprint, embeddings, answers)
