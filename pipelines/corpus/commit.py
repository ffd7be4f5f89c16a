"""The second pass of ``crem prepare``: staged files become final parts, without what several tasks hold.

The driver resolves duplicates from the ledgers alone (24 bytes a row, 8 an image reference: a shard of ten million rows
takes under a gigabyte). Each task's files are then moved as they are, or rewritten without the duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus.staging import StagedLedger, staged_file
from pipelines.tables import schema
from pipelines.tables.image_parts import ImagePartWriter
from pipelines.tables.storage import Folder, JobKind

__all__ = ["TABLES", "CommitCounts", "CommitTask", "commit", "fill_empty_tables", "resolve_duplicates"]

TABLES = {"rows": schema.ROWS, "images": schema.IMAGES, "rejected": schema.REJECTED}
"""Prepared tables by the name of their folder."""


@dataclass(frozen=True)
class CommitTask:
    """What to keep of one task's staged files."""

    number: int
    """Number of the task, and of its final part."""
    token: str
    """Of ``StagedLedger``."""
    keep_rows: NDArray[np.bool_]
    """[rows] in the order in which they were staged."""
    keep_images: NDArray[np.bool_]
    """[images] in the order in which they were staged."""


@dataclass(frozen=True)
class CommitCounts:
    """What one task added to the final tables."""

    rows_out: int
    rejected: int
    images: int
    by_reason: Counter[str]
    """Rejected rows by reason."""
    by_split_task: Counter[str]
    """Rows out by ``<split>/<task>``."""

    @classmethod
    def total(cls, counts: Sequence[CommitCounts]) -> CommitCounts:
        """Their sum."""
        return cls(
            rows_out=sum(c.rows_out for c in counts),
            rejected=sum(c.rejected for c in counts),
            images=sum(c.images for c in counts),
            by_reason=sum((c.by_reason for c in counts), Counter()),
            by_split_task=sum((c.by_split_task for c in counts), Counter()),
        )


def resolve_duplicates(ledgers: Sequence[StagedLedger]) -> list[CommitTask]:
    """Which staged rows and images each task keeps.

    The first row of an id is kept. An image is kept once, by the first task that holds it, if a kept row refers to it.
    """
    row_ids, image_ids = ([getattr(ledger, name) for ledger in ledgers] for name in ("row_ids", "image_ids"))
    keep_row = _is_first(np.concatenate(row_ids))
    row_offsets = np.cumsum([0, *(len(ids) for ids in row_ids)])
    wanted = [
        ledger.ref_images[keep_row[start + ledger.ref_rows]]
        for ledger, start in zip(ledgers, row_offsets[:-1], strict=True)
    ]
    all_images = np.concatenate(image_ids)
    keep_image = _is_first(all_images) & np.isin(all_images, np.concatenate(wanted))
    keep_rows = np.split(keep_row, row_offsets[1:-1])
    keep_images = np.split(keep_image, np.cumsum([len(ids) for ids in image_ids])[:-1])
    return [
        CommitTask(ledger.task, ledger.token, rows, images)
        for ledger, rows, images in zip(ledgers, keep_rows, keep_images, strict=True)
    ]


def _is_first(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[np.unique(values, return_index=True)[1]] = True
    return mask


def commit(task: CommitTask, *, out: Folder) -> CommitCounts:
    """Write or move one task's final parts."""
    part = f"part-{task.number:06d}.parquet"
    rows = _read(out, staged_file("rows", task.token), schema.ROWS)
    rejected = _read(out, staged_file("rejected", task.token), schema.REJECTED)
    kept = rows.filter(pa.array(task.keep_rows))
    rejected = pa.concat_tables([rejected, _duplicates(rows.filter(pa.array(~task.keep_rows)))])
    for table, name in ((kept, "rows"), (rejected, "rejected")):
        if table.num_rows:
            out.write_bytes(_parquet(table), name, part)
    images = int(task.keep_images.sum())
    if images == len(task.keep_images) and images:
        out.move(staged_file("images", task.token), f"images/{part}")
    elif images:
        _rewrite(out, staged_file("images", task.token), f"images/{part}", task.keep_images)
    splits_tasks = zip(kept["split"].to_pylist(), kept["task"].to_pylist(), strict=True)
    return CommitCounts(
        rows_out=kept.num_rows,
        rejected=rejected.num_rows,
        images=images,
        by_reason=Counter(rejected["reason"].to_pylist()),
        by_split_task=Counter(f"{split}/{name}" for split, name in splits_tasks),
    )


def fill_empty_tables(out: Folder) -> None:
    """Give a table without a single row an empty part, so that its schema can be read."""
    for name, table in TABLES.items():
        if not out.child(name).files(".parquet"):
            out.write_bytes(_parquet(table.empty_table()), name, "part-000000.parquet")


def _duplicates(rows: pa.Table) -> pa.Table:
    """Rejections of rows whose id an earlier row has."""
    details = [
        f"key {key!r} of source {source!r} is used by an earlier row; make keys unique within a source"
        for key, source in zip(rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True)
    ]
    fixed = [pa.array([value] * rows.num_rows, pa.string()) for value in (JobKind.PREPARE.value, "duplicate_id")]
    columns = [rows["id"], rows["source"], rows["key"], *fixed, pa.array(details, pa.string())]
    return pa.table(columns, schema=schema.REJECTED)


def _read(out: Folder, name: str, table: pa.Schema) -> pa.Table:
    if not out.exists(name):
        return table.empty_table()
    with out.open(name) as file:
        return pq.ParquetFile(file).read()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    options = {"use_dictionary": False, "write_statistics": ["id"]}  # as schema.ROWS_ROW_GROUP_ROWS says
    pq.write_table(table, sink, compression="zstd", row_group_size=schema.ROWS_ROW_GROUP_ROWS, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _rewrite(out: Folder, staged: str, final: str, keep: NDArray[np.bool_]) -> None:
    """Copy the kept images, a row group at a time."""
    start = 0
    with out.open(staged) as source, out.open(final, mode="wb") as sink:
        reader = pq.ParquetFile(source)
        with ImagePartWriter(sink) as writer:
            for index in range(reader.num_row_groups):
                group = reader.read_row_group(index)
                mask = keep[start : start + group.num_rows]
                start += group.num_rows
                if mask.any():
                    writer.write(group.filter(pa.array(mask)))
