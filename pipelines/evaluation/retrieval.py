"""Retrieval over the test rows: Precision@1 and @10 of every task (direction), and their mean.

The candidates of a task are the distinct targets of all its test rows, so chance is 1 and 10 over their number. A
candidate that scores as high as the target counts against it. The mean gives every task equal weight, as MMEB's score
does its datasets. Embeddings are float32 [contents, D]; contents are numbered, each distinct one embedded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.evaluation_result import (
    ExampleContent,
    ExampleHit,
    MeanPrecision,
    RetrievalExample,
    RetrievalFigures,
)
from pipelines.tables.prepared import PreparedRows

__all__ = [
    "Content",
    "Direction",
    "RetrievalSet",
    "example_content",
    "mean_precision",
    "precision",
    "retrieval_examples",
    "retrieval_set",
    "target_ranks",
]

_EXAMPLES_PER_TASK = 12
_TOP = 5
_QUERY_BLOCK = 1024
"""Queries that are scored against all candidates at a time."""


class Content(NamedTuple):
    """Where a distinct content is found first: row of the table, ``query`` or ``target``."""

    row: int
    side: str


@dataclass(frozen=True)
class Direction:
    """The queries of one task, and their targets; contents by number."""

    task: str
    queries: NDArray[np.int64]
    targets: NDArray[np.int64]
    """of each query"""
    splits: tuple[str, ...]
    """of each query"""
    candidates: NDArray[np.int64]
    """the distinct targets, sorted"""


@dataclass(frozen=True)
class RetrievalSet:
    """The distinct contents of the test rows, and the directions among them."""

    contents: tuple[Content, ...]
    directions: tuple[Direction, ...]
    """by name of their task"""


def retrieval_set(rows: PreparedRows) -> RetrievalSet:
    """The directions of the rows that have a target."""
    numbers: dict[str, int] = {}
    contents: list[Content] = []
    by_task: dict[str, list[tuple[int, int, str]]] = {}
    for at, row in enumerate(rows.table.select(["task", "split", "query", "target"]).to_pylist()):
        if row["target"] is None:
            continue
        for side in ("query", "target"):
            if repr(row[side]) not in numbers:
                numbers[repr(row[side])] = len(contents)
                contents.append(Content(at, side))
        pair = (numbers[repr(row["query"])], numbers[repr(row["target"])], row["split"])
        by_task.setdefault(row["task"] or "retrieval", []).append(pair)
    directions = []
    for task, pairs in sorted(by_task.items()):
        queries, targets, splits = zip(*pairs, strict=True)
        directions.append(Direction(task, np.array(queries), np.array(targets), splits, np.unique(targets)))
    return RetrievalSet(tuple(contents), tuple(directions))


def target_ranks(direction: Direction, embeddings: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many candidates score at least as high as each query's target, itself excluded; 0 is a hit."""
    own = np.searchsorted(direction.candidates, direction.targets)
    ranks = np.empty(len(own), dtype=np.int64)
    for start in range(0, len(own), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        scores = embeddings[direction.queries[block]] @ embeddings[direction.candidates].T
        target_scores = scores[np.arange(len(scores)), own[block]][:, None]
        ranks[block] = (~(scores < target_scores)).sum(1) - 1  # NaN counts against the model
    return ranks


def precision(direction: Direction, ranks: NDArray[np.int64]) -> dict[str, RetrievalFigures]:
    """The figures of a direction by split; ``all`` is every query."""
    splits, candidates = np.array(direction.splits), len(direction.candidates)
    figures = {}
    for split in [*sorted(set(direction.splits)), "all"]:
        chosen = ranks if split == "all" else ranks[splits == split]
        figures[split] = RetrievalFigures(
            precision_at_1=float((chosen == 0).mean()),
            precision_at_10=float((chosen < 10).mean()),
            chance_at_1=1 / candidates,
            chance_at_10=min(1.0, 10 / candidates),
            queries=len(chosen),
            candidates=candidates,
        )
    return figures


def mean_precision(retrieval: Mapping[str, Mapping[str, RetrievalFigures]]) -> dict[str, MeanPrecision]:
    """Precision@1 and chance by split, every task with equal weight."""
    means = {}
    for split in sorted({split for by_split in retrieval.values() for split in by_split}):
        figures = [by_split[split] for by_split in retrieval.values() if split in by_split]
        means[split] = MeanPrecision(
            precision_at_1=float(np.mean([f.precision_at_1 for f in figures])),
            chance_at_1=float(np.mean([f.chance_at_1 for f in figures])),
            directions=len(figures),
        )
    return means


def retrieval_examples(
    rows: PreparedRows,
    contents: Sequence[Content],
    direction: Direction,
    embeddings: NDArray[np.float32],
    ranks: NDArray[np.int64],
) -> list[RetrievalExample]:
    """An even spread of the queries of a direction with their best candidates."""
    queries, targets = direction.queries, direction.targets
    examples = []
    for at in np.linspace(0, len(queries) - 1, min(_EXAMPLES_PER_TASK, len(queries))).astype(int):
        scores = embeddings[direction.candidates] @ embeddings[queries[at]]
        best = direction.candidates[np.argsort(-scores, kind="stable")[:_TOP]]
        top = []
        for candidate in best:
            found = example_content(rows, *contents[candidate])
            top.append(ExampleHit(found.text, found.images, right=bool(candidate == targets[at])))
        examples.append(
            RetrievalExample(
                task=direction.task,
                split=direction.splits[at],
                query=example_content(rows, *contents[queries[at]]),
                target=example_content(rows, *contents[targets[at]]),
                top=top,
                rank=int(ranks[at]) + 1,
            )
        )
    return examples


def example_content(rows: PreparedRows, row: int, side: str) -> ExampleContent:
    """One side of a row as an example has it."""
    value = rows.table.column(side)[row].as_py()
    return ExampleContent(value["text"], list(value["images"] or ()))
