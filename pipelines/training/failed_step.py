"""The rows of a step whose loss was not finite or exploded, in ``failed_step.json``.

No worker has to send them: the order of a run is a pure function of seed and step.
"""

from __future__ import annotations

import math
from typing import Any

from crem.config import RunConfig
from crem.errors import DivergenceError, TrainingError
from pipelines.tables.prepared import PreparedRows
from pipelines.tables.storage import Folder

__all__ = ["FAILED_STEP", "rows_of_step", "saved_step"]

FAILED_STEP = "failed_step.json"
_CHARS = 80


def rows_of_step(rows: PreparedRows, config: RunConfig, step: int, ranks: int) -> list[dict[str, Any]]:
    """The global batch of a step by rank: of each row its id, source, task, z, images and the start of its texts."""
    plan, out = rows.plan(config), []
    for rank in range(ranks):
        share = plan.step(step, rank=rank, ranks=ranks)
        found = rows.table.take(share.rows).to_pylist()
        out.append({"rank": rank, "rows": [_shown(row, bool(z)) for row, z in zip(found, share.z, strict=True)]})
    return out


def _shown(row: dict[str, Any], z: bool) -> dict[str, Any]:
    query, target = row["query"], row["target"] or {"text": None, "images": None}
    texts = {"query": query["text"], "target": target["text"], "question": row["question"], "answer": row["answer"]}
    return {
        "id": row["id"],
        "source": row["source"],
        "task": row["task"],
        "z": z,
        **{name: text[:_CHARS] for name, text in texts.items() if text},
        "images": [*(query["images"] or ()), *(target["images"] or ())],
    }


def saved_step(error: DivergenceError, rows: PreparedRows, config: RunConfig, run: Folder) -> TrainingError:
    """Write the step's rows down; returns the error to raise, which names the file."""
    ranks = rows_of_step(rows, config, error.step, error.ranks)
    terms = {name: value if math.isfinite(value) else str(value) for name, value in error.terms.items()}
    run.write_json({"step": error.step, **terms, "ranks": ranks}, FAILED_STEP)
    count = sum(len(share["rows"]) for share in ranks)
    return TrainingError(f"{error}. The ids of the {count} rows of the step are in {run.path(FAILED_STEP)}")
