"""Answers to the questions of the test rows: exact match in both modes, and the keys and values that an item keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.evaluation.evaluation_result import AnswerExample, AnswerFigures, CacheFigures
from pipelines.evaluation.retrieval import example_content
from pipelines.tables.prepared import PreparedRows

__all__ = ["GivenAnswers", "answer_examples", "answer_figures", "cache_figures", "chosen_questions"]

_EXAMPLES = 24


@dataclass(frozen=True)
class GivenAnswers:
    """The model's answers to one question, and the bytes of keys and values kept of the item."""

    native: str
    native_bytes: int
    compressed: str | None = None
    """None for a model without chorus tokens, as ``compressed_bytes``"""
    compressed_bytes: int | None = None


def chosen_questions(rows: PreparedRows, max_per_split: int) -> list[int]:
    """Rows with a question and an answer, at most ``max_per_split`` of a split, an even spread."""
    by_split: dict[str, list[int]] = {}
    for at, row in enumerate(rows.table.select(["split", "question", "answer"]).to_pylist()):
        if row["question"] and row["answer"]:
            by_split.setdefault(row["split"], []).append(at)
    chosen = []
    for numbers in by_split.values():
        stride = max(1.0, len(numbers) / max_per_split)
        chosen += [numbers[int(i * stride)] for i in range(min(max_per_split, len(numbers)))]
    return chosen


def answer_figures(
    rows: PreparedRows, questions: Sequence[int], answers: Sequence[GivenAnswers]
) -> dict[str, AnswerFigures]:
    """Exact match by split, beside the share of the commonest answer; ``answers`` in the order of ``questions``."""
    expected = rows.table.select(["split", "answer"]).take(pa.array(questions, pa.int64())).to_pylist()
    figures = {}
    for split in [*sorted({row["split"] for row in expected}), "all"]:
        pairs = [
            (row["answer"], given)
            for row, given in zip(expected, answers, strict=True)
            if split in ("all", row["split"])
        ]
        if not pairs:
            continue
        commonest, count = Counter(answer for answer, _ in pairs).most_common(1)[0]
        figures[split] = AnswerFigures(
            native=sum(_is_right(given.native, answer) for answer, given in pairs) / len(pairs),
            compressed=sum(_is_right(given.compressed, answer) for answer, given in pairs) / len(pairs)
            if all(given.compressed is not None for _, given in pairs)
            else None,
            commonest=count / len(pairs),
            commonest_answer=commonest,
            questions=len(pairs),
        )
    return figures


def cache_figures(answers: Sequence[GivenAnswers]) -> CacheFigures | None:
    """Mean bytes per item in both modes; None without answers."""
    if not answers:
        return None
    native = float(np.mean([given.native_bytes for given in answers]))
    sizes = [given.compressed_bytes for given in answers if given.compressed_bytes is not None]
    if not sizes:
        return CacheFigures(native, None, None)
    compressed = float(np.mean(sizes))
    return CacheFigures(native, compressed, compressed / native)


def answer_examples(
    rows: PreparedRows, questions: Sequence[int], answers: Sequence[GivenAnswers]
) -> list[AnswerExample]:
    """An even spread of the questions with what was answered."""
    examples = []
    for at in np.linspace(0, len(questions) - 1, min(_EXAMPLES, len(questions))).astype(int):
        row, given = questions[at], answers[at]
        split, question, answer = (rows.table.column(name)[row].as_py() for name in ("split", "question", "answer"))
        examples.append(
            AnswerExample(
                split=split,
                question=question,
                answer=answer,
                query=example_content(rows, row, "query"),
                native=given.native,
                compressed=given.compressed,
                native_right=_is_right(given.native, answer),
                compressed_right=_is_right(given.compressed, answer),
            )
        )
    return examples


def _is_right(given: str | None, expected: str) -> bool:
    return given is not None and given.strip().casefold() == expected.strip().casefold()
