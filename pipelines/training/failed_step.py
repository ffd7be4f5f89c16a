"""The rows of a step whose loss was not finite or exploded, in ``failed_step.json``.

The driver finds them without the workers: the order of a run is a pure function of seed and step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from crem.config import RunConfig
from crem.errors import DivergenceError, TrainingError
from pipelines.tables.chosen_rows import content_of
from pipelines.tables.row_index import RowIndex
from pipelines.tables.storage import Folder

__all__ = ["FAILED_STEP", "FailedRow", "RankRows", "rows_of_step", "save_failed_step"]

FAILED_STEP = "failed_step.json"
_CHARS = 80


@dataclass(frozen=True)
class FailedRow:
    """One row of the step."""

    id: int
    source: str
    task: str
    z: bool
    images: list[int]
    """ids in the image table"""
    texts: dict[str, str]
    """the start of those it has of query, target, question and answer"""

    @classmethod
    def of(cls, row: dict[str, Any], z: bool) -> FailedRow:
        """From a row of the prepared table (``schema.ROWS``)."""
        query, target = row["query"], row["target"] or {"text": None, "images": None}
        texts = {"query": query["text"], "target": target["text"], "question": row["question"], "answer": row["answer"]}
        return cls(
            id=row["id"],
            source=row["source"],
            task=row["task"],
            z=z,
            images=[*(query["images"] or ()), *(target["images"] or ())],
            texts={name: text[:_CHARS] for name, text in texts.items() if text},
        )

    def as_dict(self) -> dict[str, object]:
        """As in the file, where the texts are fields of the row."""
        own = {"id": self.id, "source": self.source, "task": self.task, "z": self.z}
        return {**own, **self.texts, "images": self.images}


@dataclass(frozen=True)
class RankRows:
    """The share of the step that a rank had."""

    rank: int
    rows: list[FailedRow]

    def as_dict(self) -> dict[str, object]:
        """As in the file."""
        return {"rank": self.rank, "rows": [row.as_dict() for row in self.rows]}


def rows_of_step(rows: RowIndex, config: RunConfig, step: int, ranks: int) -> list[RankRows]:
    """The global batch of a step, by rank."""
    plan, out = rows.plan(config), []
    for rank in range(ranks):
        share = plan.step(step, rank=rank, ranks=ranks)
        found = content_of(rows.select(share.rows)).to_pylist()
        out.append(RankRows(rank, [FailedRow.of(row, bool(z)) for row, z in zip(found, share.z, strict=True)]))
    return out


def save_failed_step(error: DivergenceError, rows: RowIndex, config: RunConfig, run: Folder) -> TrainingError:
    """Write the step's rows down; returns the error to raise, which names the file."""
    ranks = rows_of_step(rows, config, error.step, error.ranks)
    terms = {name: value if math.isfinite(value) else str(value) for name, value in error.terms.items()}
    run.write_json({"step": error.step, **terms, "ranks": [share.as_dict() for share in ranks]}, FAILED_STEP)
    count = sum(len(share.rows) for share in ranks)
    return TrainingError(f"{error}. The ids of the {count} rows of the step are in {run.path(FAILED_STEP)}")
