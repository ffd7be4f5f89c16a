"""``crem prepare``: a raw corpus becomes prepared tables.

Two passes, both Ray Data, both streaming; images never pass through the driver or the object store.

1. *Stage*: each task reads its pieces, validates each row, decodes and re-encodes each of its images once, and writes
   rows, images and rejections to files of its own under ``_staging/``. It returns a ledger: only identifiers.
2. The driver decides from all ledgers which row of a key is the first and which task owns an image that several hold
   (24 bytes a row, 8 an image reference: a shard of ten million rows takes under a gigabyte).
3. *Settle*: each task's files become final parts, moved as they are, or rewritten without what was decided against.

A staged file counts only if its task's ledger arrived, so a task that died and ran again leaves nothing behind. The
manifest is written last; a killed run has none, and the next run into the same folder starts clean.
"""

from __future__ import annotations

import json
import logging
import platform
import time
import uuid
from collections import Counter
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from crem.config import RunConfig
from crem.errors import ConfigError
from pipelines.corpus import sources
from pipelines.corpus.image_reader import ImageReader
from pipelines.corpus.raw_rows import COLUMNS
from pipelines.corpus.sources import Piece
from pipelines.corpus.staging import Stage
from pipelines.tables import schema, session
from pipelines.tables.manifest import KIND, MANIFEST
from pipelines.tables.storage import Folder

__all__ = ["prepare"]

log = logging.getLogger(__name__)
STAGING = "_staging"
TABLES = {"rows": schema.ROWS, "images": schema.IMAGES, "rejected": schema.REJECTED}

_LOG_EVERY_S = 10.0


def prepare(source: str, out: str, config: RunConfig) -> dict[str, Any]:
    """Prepare the raw corpus at ``source`` into ``out`` (paths or URIs).

    Returns:
        the manifest: ``rows_in == rows_out + rejected + filtered``, ``images``, ``by_reason``, ``by_split_task``, …

    Raises:
        ConfigError: no corpus there, no usable row in it, ``out`` holds something else, or a node of the cluster does
            not see a local ``source`` or ``out``.
    """
    began = time.monotonic()
    corpus = sources.find(source)
    target = Folder.at(out)
    if target.uri == corpus.root.uri:
        raise ConfigError(f"--out {out!r} is the corpus itself; choose another folder")
    reader = ImageReader.of(corpus.root, _bounds(config))
    pieces = sources.split(corpus, COLUMNS, config.prepare.rows_per_task)
    rows_in = sum(piece.rows for piece in pieces)
    if not rows_in:
        raise ConfigError(f"{source!r} has {len(corpus.names)} files and not one row in them; fill it first")
    session.connect()
    session.require_readable(corpus.rows, *corpus.names)
    session.require_readable(corpus.root, *reader.files)
    target.claim(KIND)
    session.require_shared(target)
    for old in (MANIFEST, *TABLES, STAGING):  # only here: what was refused above has changed nothing
        target.remove(old)
    log.info("preparing %d rows of %d files from %s", rows_in, len(corpus.names), corpus.root.uri)
    with session.remote_errors():
        ledgers = _stage(target, corpus.root.name, reader, pieces, rows_in, config)
        settled = _settle(target, ledgers)
    manifest = _manifest(corpus.root.uri, rows_in, settled, config)
    _check(manifest, target)
    _fill_empty(target)
    target.remove(STAGING)
    target.write_json(manifest, MANIFEST)
    seconds = time.monotonic() - began
    log.info(
        "prepared %d rows in = %d out + %d rejected + %d filtered; %d images; %.1f s, %.0f rows/s",
        *(manifest[k] for k in ("rows_in", "rows_out", "rejected", "filtered", "images")),
        seconds,
        rows_in / seconds,
    )
    return manifest


def _bounds(config: RunConfig) -> Any:
    """Limits of decoding: images are kept as large as ``encode_max_pixels`` asks, whatever the model looks at."""
    return config.model.image.model_copy(update={"max_pixels": config.prepare.encode_max_pixels})


# ------------------------------------------------------------------------------------------------ pass 1: stage


def _stage(
    target: Folder, name: str, reader: ImageReader, pieces: list[Piece], rows_in: int, config: RunConfig
) -> list[dict[str, Any]]:
    groups = sources.group(pieces, config.prepare.rows_per_task)
    tasks = [{"task": i, "pieces": json.dumps([p.to_dict() for p in group])} for i, group in enumerate(groups)]
    staged = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        partial(_stage_task, target=target, source=name, reader=reader, config=config)
    )
    ledgers: list[dict[str, Any]] = []
    done = rejected = 0
    began = said = time.monotonic()
    for ledger in session.results(staged):
        ledgers.append(ledger)
        done += ledger["rows_in"]
        rejected += ledger["rejected"]
        now = time.monotonic()
        if now - said > _LOG_EVERY_S:
            said = now
            log.info("%d of %d rows, %d rejected, %.0f rows/s", done, rows_in, rejected, done / (now - began))
    ledgers.sort(key=lambda ledger: ledger["task"])
    if len(ledgers) != len(tasks) or done != rows_in:
        raise RuntimeError(f"{done} of {rows_in} rows came back from {len(ledgers)} of {len(tasks)} tasks")
    return ledgers


def _stage_task(
    task: dict[str, Any], *, target: Folder, source: str, reader: ImageReader, config: RunConfig
) -> dict[str, bytes]:
    token = f"{task['task']:06d}-{uuid.uuid4().hex[:8]}"

    def run() -> dict[str, Any]:
        with Stage(target.child(STAGING), token, source, reader, config) as stage:
            for piece in json.loads(task["pieces"]):
                for record in sources.read(Piece.from_dict(piece), COLUMNS):
                    stage.add(record)
        return {"task": task["task"], "token": token, **stage.ledger()}

    return session.attempt(run)


# ------------------------------------------------------------------------------------- decide: who keeps what


def decide(ledgers: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which staged rows and images each task keeps, as boolean masks in the order in which they were staged.

    The first row of an id is kept. An image is kept once, by the first task that holds it, if a kept row refers to it.
    """
    rows = [np.frombuffer(ledger["row_ids"], np.int64) for ledger in ledgers]
    images = [np.frombuffer(ledger["image_ids"], np.int64) for ledger in ledgers]
    keep_row = _is_first(np.concatenate(rows)) if rows else np.zeros(0, bool)
    row_offsets = np.cumsum([0, *(len(r) for r in rows)])
    wanted = [
        np.frombuffer(ledger["ref_images"], np.int64)[keep_row[start + np.frombuffer(ledger["ref_rows"], np.int64)]]
        for ledger, start in zip(ledgers, row_offsets[:-1], strict=True)
    ]
    every_image = np.concatenate(images)
    keep_image = _is_first(every_image) & np.isin(every_image, np.concatenate(wanted))
    image_offsets = np.cumsum([len(i) for i in images])[:-1]
    return list(zip(np.split(keep_row, row_offsets[1:-1]), np.split(keep_image, image_offsets), strict=True))


def _is_first(values: np.ndarray) -> np.ndarray:
    mask = np.zeros(len(values), bool)
    mask[np.unique(values, return_index=True)[1]] = True
    return mask


# ------------------------------------------------------------------------------------------------ pass 2: settle


def _settle(target: Folder, ledgers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tasks = [
        {"task": i, "token": ledger["token"], "keep_rows": rows.tobytes(), "keep_images": images.tobytes()}
        for i, (ledger, (rows, images)) in enumerate(zip(ledgers, decide(ledgers), strict=True))
    ]
    settled = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        lambda task: session.attempt(partial(_settle_task, task, target=target))
    )
    results = list(session.results(settled))
    if len(results) != len(tasks):
        raise RuntimeError(f"{len(results)} of {len(tasks)} tasks settled their files")
    return results


def _settle_task(task: dict[str, Any], *, target: Folder) -> dict[str, Any]:
    part = f"part-{task['task']:06d}.parquet"
    keep_rows = np.frombuffer(task["keep_rows"], bool)
    keep_images = np.frombuffer(task["keep_images"], bool)
    staged = {table: f"{STAGING}/{table}-{task['token']}.parquet" for table in TABLES}
    rows = _read(target, staged["rows"], schema.ROWS)
    rejected = _read(target, staged["rejected"], schema.REJECTED)
    kept = rows.filter(pa.array(keep_rows))
    rejected = pa.concat_tables([rejected, _duplicates(rows.filter(pa.array(~keep_rows)))])
    for table, name in ((kept, "rows"), (rejected, "rejected")):
        if table.num_rows:
            target.write_bytes(_parquet(table), name, part)
    images = int(keep_images.sum())
    if images == len(keep_images) and images:
        target.move(staged["images"], f"images/{part}")
    elif images:
        _rewrite(target, staged["images"], f"images/{part}", keep_images)
    by_split_task = Counter(
        f"{split}/{name}" for split, name in zip(kept["split"].to_pylist(), kept["task"].to_pylist(), strict=True)
    )
    return {
        "rows_out": kept.num_rows,
        "rejected": rejected.num_rows,
        "images": images,
        "by_reason": Counter(rejected["reason"].to_pylist()),
        "by_split_task": by_split_task,
    }


def _duplicates(rows: pa.Table) -> pa.Table:
    """Rejections of rows whose id an earlier row has."""
    details = [
        f"key {key!r} of source {source!r} is used by an earlier row; make keys unique within a source"
        for key, source in zip(rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True)
    ]
    fixed = [pa.array([value] * rows.num_rows, pa.string()) for value in (KIND, "duplicate_id")]
    columns = [rows["id"], rows["source"], rows["key"], *fixed, pa.array(details, pa.string())]
    return pa.table(columns, schema=schema.REJECTED)


def _read(target: Folder, name: str, table: pa.Schema) -> pa.Table:
    if not target.exists(name):
        return table.empty_table()
    with target.open(name) as file:
        return pq.ParquetFile(file).read()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _rewrite(target: Folder, staged: str, final: str, keep: np.ndarray) -> None:
    """Copy the kept images, a row group at a time."""
    start = 0
    with target.open(staged) as source, target.open(final, mode="wb") as sink:
        reader = pq.ParquetFile(source)
        with pq.ParquetWriter(sink, schema.IMAGES, compression="none") as writer:
            for index in range(reader.num_row_groups):
                group = reader.read_row_group(index)
                mask = keep[start : start + group.num_rows]
                start += group.num_rows
                if mask.any():
                    writer.write_table(group.filter(pa.array(mask)))


# ------------------------------------------------------------------------------------------------ account for it


def _manifest(source_uri: str, rows_in: int, settled: list[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    def total(name: str) -> int:
        return sum(result[name] for result in settled)

    def tally(name: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for result in settled:
            counts.update(result[name])
        return dict(sorted(counts.items()))

    return {
        "kind": KIND,
        "rows_in": rows_in,
        "rows_out": total("rows_out"),
        "rejected": total("rejected"),
        "filtered": 0,
        "images": total("images"),
        "by_reason": tally("by_reason"),
        "by_split_task": tally("by_split_task"),
        "source_uri": source_uri,
        "created_with": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("ray", "pyarrow", "pillow")},
        "config": {"prepare": config.prepare.model_dump(), "image": config.model.image.model_dump()},
    }


def _check(manifest: dict[str, Any], target: Folder) -> None:
    accounted = manifest["rows_out"] + manifest["rejected"] + manifest["filtered"]
    if accounted != manifest["rows_in"]:
        raise RuntimeError(f"{manifest['rows_in']} rows went in and {accounted} are accounted for: {manifest}")
    if not manifest["rows_out"]:
        raise ConfigError(
            f"none of the {manifest['rows_in']} rows can be used: {manifest['by_reason']}; "
            f"{target.uri}/rejected says why for each"
        )


def _fill_empty(target: Folder) -> None:
    """Give a table without a single row an empty part, so that its schema can be read."""
    for name, table in TABLES.items():
        if not target.child(name).files(".parquet"):
            target.write_bytes(_parquet(table.empty_table()), name, "part-000000.parquet")
