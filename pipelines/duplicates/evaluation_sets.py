"""What the evaluation sets hold, by id: small beside a corpus, so that every task gets all of it.

Of prepared tables with splits other than ``train…`` these splits are the evaluation set, else all rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crem.config import PrepareConfig
from pipelines.duplicates.parts import TablePart, pieces
from pipelines.duplicates.row_content import COLUMNS, evidence_texts, images_of, near_key
from pipelines.duplicates.text_signature import text_id
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import read_manifest, table_parts
from pipelines.tables.schema import content_id
from pipelines.tables.storage import Folder

__all__ = ["EvaluationSet", "evaluation_row_key", "is_training_split", "read_evaluation_sets"]


@dataclass(frozen=True)
class EvaluationSet:
    """The ids of what one evaluation set holds, each array sorted."""

    uri: str
    images: NDArray[np.int64]
    """Images of its rows, negatives (candidates) included."""
    texts: NDArray[np.int64]
    """``text_id`` of the texts of ``evidence_texts``."""
    rows: NDArray[np.int64]
    """``evaluation_row_key`` of its rows."""
    row_parts: tuple[TablePart, ...]
    image_parts: tuple[TablePart, ...]


def is_training_split(split: str | None) -> bool:
    """Rows of other splits are for evaluation: they are never left out as duplicates."""
    return (split or "train").lower().startswith("train")


def evaluation_row_key(key: bytes) -> int:
    """``near_key`` of a row, as it is looked up."""
    return content_id(key)


def read_evaluation_sets(uris: Sequence[str], config: PrepareConfig) -> list[EvaluationSet]:
    """The evaluation sets at ``uris``.

    Raises:
        ConfigError: there are no completed prepared tables at one of them.
    """
    return [_read(Folder.at(uri), config) for uri in uris]


def _read(folder: Folder, config: PrepareConfig) -> EvaluationSet:
    manifest = read_manifest(folder)
    splits = {name.partition("/")[0] for name in manifest.by_split_task}
    train_too = all(is_training_split(split) for split in splits)
    rows = [TablePart(folder.child("rows"), (name,), rows=0) for name in table_parts(folder, "rows")]
    images = [TablePart(folder.child("images"), (name,), rows=0) for name in table_parts(folder, "images")]
    run = partial(_read_part, train_too=train_too, min_chars=config.contamination_text_chars)
    dataset = ray_tasks.task_dataset(rows).map(lambda row: ray_tasks.attempt(run, row[ray_tasks.TASK]))
    read = list(ray_tasks.results(dataset))
    held = [np.unique(np.concatenate([np.empty(0, np.int64), *arrays])) for arrays in zip(*read, strict=True)]
    image_ids, text_ids, row_keys = held
    return EvaluationSet(folder.uri, image_ids, text_ids, row_keys, tuple(rows), tuple(images))


def _read_part(part: TablePart, *, train_too: bool, min_chars: int) -> tuple[NDArray[np.int64], ...]:
    images: set[int] = set()
    texts: set[int] = set()
    keys: set[int] = set()
    for _, table in pieces(part, [*COLUMNS, "negatives"]):
        for row in table.to_pylist():
            if not train_too and is_training_split(row["split"]):
                continue
            images |= {*images_of(row), *(i for n in row["negatives"] or () for i in n["images"] or ())}
            texts |= {text_id(text) for text in evidence_texts(row, min_chars)}
            keys.add(evaluation_row_key(near_key(row, int, int)))
    return tuple(np.fromiter(sorted(ids), np.int64, len(ids)) for ids in (images, texts, keys))
