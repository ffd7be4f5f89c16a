"""One pass over the rows: those in another language or of an evaluation set are left out, the others get their keys.

A row that is left out here is no duplicate of another one, nor is another one its duplicate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from crem.config import PrepareConfig
from pipelines.duplicates.decision_tables import DECISIONS, filtered_file, write_table
from pipelines.duplicates.evaluation_sets import EvaluationSet, evaluation_row_key, is_training_split
from pipelines.duplicates.language import LanguageFilter
from pipelines.duplicates.near_items import NearItems
from pipelines.duplicates.parts import TablePart, pieces
from pipelines.duplicates.row_content import COLUMNS, evidence_texts, exact_key, images_of, near_key, texts_of
from pipelines.duplicates.text_signature import text_id
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder

__all__ = ["ROW_RECORD", "Known", "RowTask", "key_rows"]

ROW_RECORD = pa.schema(
    [
        ("bucket", pa.int32()),
        ("near", pa.binary(16)),  # near_key; of all zeros: no row, but a count of rows that are left out
        ("exact", pa.binary(16)),  # exact_key
        ("train", pa.bool_()),
        ("part", pa.int32()),
        ("position", pa.int64()),
        ("id", pa.int64()),
        ("name", pa.string()),
    ]
)
COUNT = bytes(16)
"""``near`` of a count: ``name`` is its stage and reason, ``position`` the number of rows."""


@dataclass(frozen=True)
class RowTask:
    """A part of the rows, and its number in the order of the corpus."""

    number: int
    part: TablePart


@dataclass(frozen=True)
class Known:
    """What every task knows of the whole corpus and of the evaluation sets."""

    items: NearItems | None
    evaluation: list[EvaluationSet]

    def contamination(self, row: ArrowRow, min_chars: int) -> tuple[str, str] | None:
        """Reason and detail where the row is from an evaluation set, or None."""
        if not self.evaluation:
            return None
        for image in images_of(row):
            if found := self._held(image, "images"):
                number, there = found
                uri = self.evaluation[number - 1].uri
                return "evaluation_image", f"image {image} is, or is near, image {there} of {uri}"
        for text in evidence_texts(row, min_chars):
            if found := self._held(text_id(text), "texts"):
                return "evaluation_text", f"{text[:80]!r} is, or is near, a text of {self.evaluation[found[0] - 1].uri}"
        if found := self._held(evaluation_row_key(near_key(row, int, int)), "rows"):
            return "evaluation_row", f"a row of the same content is in {self.evaluation[found[0] - 1].uri}"
        return None

    def _held(self, item: int, what: str) -> tuple[int, int] | None:
        """Number of the evaluation set, from 1 on, that holds an item or a near one, and the id there."""
        for number, held in enumerate(self.evaluation, 1):
            ids: NDArray[np.int64] = getattr(held, what)
            at = int(np.searchsorted(ids, item))
            if at < len(ids) and int(ids[at]) == item:
                return number, item
        if self.items is None or what == "rows":
            return None
        near = self.items.evaluation_images if what == "images" else self.items.evaluation_texts
        return near.get(item)


def key_rows(
    task: RowTask, *, known: ray.ObjectRef[Known], config: PrepareConfig, work: Folder, buckets: int
) -> Iterator[pa.Table]:
    """On a worker: the keys of the rows of one task that stay; what leaves is written to ``work``."""
    seen: Known = ray.get(known)
    left_out: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    language = LanguageFilter.of(config)
    for positions, table in pieces(task.part, COLUMNS):
        records = []
        for position, row in zip(positions.tolist(), table.to_pylist(), strict=True):
            verdict = _verdict(row, seen, language, config)
            if verdict is not None:
                stage, reason, detail = verdict
                counts[f"{stage}/{reason}"] += 1
                if stage == "language" or config.contaminated == "drop":
                    left_out.append(
                        {"id": row["id"], "stage": stage, "reason": reason, "detail": detail, "cluster": None}
                    )
                    continue
            records.append(_record(row, position, task.number, seen, config, buckets))
        yield pa.Table.from_pylist(records, schema=ROW_RECORD)
    write_table(left_out, DECISIONS, work, filtered_file(task.number))
    of_task = [_count(name, count, task.number % buckets) for name, count in sorted(counts.items())]
    yield pa.Table.from_pylist(of_task, schema=ROW_RECORD)


def _verdict(
    row: ArrowRow, known: Known, language: LanguageFilter | None, config: PrepareConfig
) -> tuple[str, str, str] | None:
    """Stage, reason and detail where a row is not to be trained on; rows for evaluation are never contaminated."""
    if language is not None and (objection := language.objection(texts_of(row))):
        return "language", "other_language", objection
    if is_training_split(row["split"]) and (found := known.contamination(row, config.contamination_text_chars)):
        return "contamination", *found
    return None


def _record(
    row: ArrowRow, position: int, part: int, known: Known, config: PrepareConfig, buckets: int
) -> dict[str, Any]:
    exact = exact_key(row)
    near = exact
    if config.near_duplicates != "off" and known.items is not None:
        near = near_key(row, known.items.texts.of, known.items.images.of)
    return {
        "bucket": int.from_bytes(near[:4], "big") % buckets,
        "near": near,
        "exact": exact,
        "train": is_training_split(row["split"]),
        "part": part,
        "position": position,
        "id": row["id"],
        "name": f"{row['source']}/{row['key']}",
    }


def _count(name: str, count: int, bucket: int) -> dict[str, Any]:
    record = {"bucket": bucket, "near": COUNT, "exact": COUNT, "train": False, "part": 0, "id": 0}
    return {**record, "position": count, "name": name}
