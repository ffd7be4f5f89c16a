"""The staged windows of a shard become its parts, and its ledger makes them a part of the output.

The rows of a shard stand in its parts in the order of the input. Where a part is cut depends on the number of rows and
the bytes of a row alone, so that a shard that is embedded again has the same parts.

A shard may be committed twice at once: by a job that was stopped until its lease was taken over, or by a task on a node
that was cut off. Each attempt writes parts of names of its own, and the ledger is created only if there is none. So
exactly one attempt has the shard, and none ever writes over what another has committed.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.embedding.attempts import ATTEMPTS
from pipelines.embedding.lance_dataset import write_fragment
from pipelines.embedding.output import EmbedPlan, ShardLedger, create_ledger, ledger_file, part_name, read_ledger
from pipelines.embedding.window_embedder import WindowCounts, counts_of, staged_place
from pipelines.tables.hashing_sink import HashingSink
from pipelines.tables.manifest import PartFile
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["PART_BYTES", "commit_shard", "complete_pieces"]

log = logging.getLogger(__name__)

PART_BYTES = 256 * 2**20
"""Of the vectors, states and memories of a part: large enough that a billion vectors are some ten thousand files, small
enough to be read whole. Source: the project's brief (128 MB to 1 GB)."""
_GROUP_BYTES = 8 * 2**20
"""The same of a row group."""


@dataclass(frozen=True)
class _Staged:
    name: str
    counts: WindowCounts
    first: int
    """Rows of the shard before it."""


def complete_pieces(staged: Folder) -> set[int]:
    """The pieces of a shard all of whose windows are staged."""
    windows: dict[int, set[int]] = {}
    last: dict[int, int] = {}
    for name in staged.files(".arrow"):
        piece, number, is_last = staged_place(name)
        windows.setdefault(piece, set()).add(number)
        if is_last:
            last[piece] = number
    return {piece for piece, number in last.items() if windows[piece] >= set(range(number + 1))}


def commit_shard(shard: int, pieces: range, *, target: Folder, work: Folder, plan: EmbedPlan) -> ShardLedger:
    """Write the parts and the ledger of a shard whose pieces are all staged, and remove what was staged.

    Returns the ledger of the attempt that has the shard, this one or another.
    """
    if (earlier := _committed(target, shard, plan)) is not None:
        return _cleared(work, earlier)
    folder = work.child("staged").child(f"{shard:06d}")
    staged = _survey(folder)
    found = sorted({window.counts.piece for window in staged})
    if found != list(pieces):
        raise RuntimeError(f"shard {shard} has the pieces {found[:5]} … of {len(found)} and should have {pieces}")
    rows = sum(window.counts.rows for window in staged)
    commit = uuid.uuid4().hex[:8]
    per_part = max(1, PART_BYTES // plan.row_bytes)
    parts: list[PartFile] = []
    fragments: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, rows, per_part)):
        name = part_name(shard, number, commit, plan.output_format)
        tables = partial(_groups, folder, staged, start, min(rows, start + per_part), plan)
        if plan.output_format == "lance":
            part, fragment = write_fragment(target, work, name, tables())
            fragments.append(fragment)
        else:
            part = _write_parquet(target, name, tables, plan)
        parts.append(part)
    ledger = _ledger(shard, pieces, [window.counts for window in staged], parts, plan)
    ledger = ledger.model_copy(update={"fragments": tuple(fragments)})
    if create_ledger(target, ledger):
        return _cleared(work, ledger)
    if (earlier := _committed(target, shard, plan)) is not None:
        log.warning("shard %d was committed meanwhile by another attempt; this one leaves nothing", shard)
        in_threads(target.remove, [part.name for part in parts])
        return _cleared(work, earlier)
    log.warning("the ledger of shard %d is damaged, or of another plan; it is written anew", shard)
    target.write_bytes(ledger.model_dump_json(indent=1).encode(), ledger_file(shard))
    return _cleared(work, ledger)


def _committed(target: Folder, shard: int, plan: EmbedPlan) -> ShardLedger | None:
    """The ledger of a shard that is done: of this plan, and its parts are there."""
    ledger = read_ledger(target, shard)
    if ledger is None or (ledger.identity, ledger.fingerprint) != (plan.identity, plan.fingerprint):
        return None
    return ledger if all(in_threads(target.exists, [part.name for part in ledger.parts])) else None


def _cleared(work: Folder, ledger: ShardLedger) -> ShardLedger:
    """Remove what the shard has in the work folder."""
    for folder in ("staged", ATTEMPTS):
        work.remove(folder, f"{ledger.shard:06d}")
    return ledger


def _survey(folder: Folder) -> list[_Staged]:
    names = sorted(folder.files(".arrow"), key=staged_place)
    counts = in_threads(partial(_counts, folder), names)
    stops = np.cumsum([0, *(count.rows for count in counts)]).tolist()
    return [_Staged(name, count, first) for name, count, first in zip(names, counts, stops[:-1], strict=True)]


def _counts(folder: Folder, name: str) -> WindowCounts:
    def read() -> WindowCounts:
        with folder.open(name) as opened, pa.ipc.open_file(opened) as file:
            return counts_of(file.schema)

    return require_storage(f"reading {folder.uri}/{name}", read)


def _write_parquet(target: Folder, name: str, tables: Callable[[], Iterator[pa.Table]], plan: EmbedPlan) -> PartFile:
    def write(file: IO[bytes]) -> PartFile:
        sink, writer, rows = HashingSink(file), None, 0
        for group in tables():
            writer = writer or pq.ParquetWriter(
                cast(IO[bytes], sink),
                group.schema,
                compression="zstd",
                use_dictionary=False,
                write_statistics=["id"],
                write_page_checksum=True,
            )
            writer.write_table(group, row_group_size=_rows_of_group(plan))
            rows += len(group)
        assert writer is not None, "a part has rows"
        writer.close()
        return sink.part("embeddings", name, rows)

    return target.write_stream(write, name)


def _rows_of_group(plan: EmbedPlan) -> int:
    return max(1, _GROUP_BYTES // plan.row_bytes)


def _rows(folder: Folder, staged: list[_Staged], start: int, stop: int) -> Iterator[pa.Table]:
    """The rows ``start`` to ``stop`` of the shard, by window."""
    for window in staged:
        first, last = window.first, window.first + window.counts.rows
        if last <= start or first >= stop:
            continue
        table = pa.ipc.open_file(pa.BufferReader(folder.read_bytes(window.name))).read_all()
        metadata = {k: v for k, v in table.schema.metadata.items() if k != b"crem_window"}
        yield table.slice(max(0, start - first), min(stop, last) - max(start, first)).replace_schema_metadata(metadata)


def _groups(folder: Folder, staged: list[_Staged], start: int, stop: int, plan: EmbedPlan) -> Iterator[pa.Table]:
    """The same rows in tables of a multiple of those of a row group, but for the last."""
    held: list[pa.Table] = []
    rows = _rows_of_group(plan)
    for table in _rows(folder, staged, start, stop):
        held.append(table)
        count = sum(len(some) for some in held)
        if count >= rows:
            joined = pa.concat_tables(held)
            whole = count // rows * rows
            yield joined.slice(0, whole)
            held = [joined.slice(whole)] if count > whole else []
    if held:
        yield pa.concat_tables(held)


def _ledger(
    shard: int, pieces: range, windows: list[WindowCounts], parts: list[PartFile], plan: EmbedPlan
) -> ShardLedger:
    failed: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for window in windows:
        failed.update(window.failed)
        unknown.update(window.unknown)
    return ShardLedger(
        shard=shard,
        first_piece=pieces.start,
        pieces=len(pieces),
        rows=sum(window.rows for window in windows),
        embedded=sum(window.embedded for window in windows),
        failed=dict(sorted(failed.items())),
        cut=sum(window.cut for window in windows),
        longest_text=max((window.longest_text for window in windows), default=0),
        tokens=sum(window.tokens for window in windows),
        device_s=round(sum(window.device_s for window in windows), 3),
        prepare_s=round(sum(window.prepare_s for window in windows), 3),
        seconds=round(max(w.ended for w in windows) - min(w.ended - w.device_s for w in windows), 3),
        unknown=dict(sorted(unknown.items())),
        embedded_again=sum(window.rows * (window.attempt - 1) for window in windows),
        prepared_again=sum(window.rows * (window.piece_attempt - 1) for window in windows),
        fingerprint=plan.fingerprint,
        identity=plan.identity,
        parts=tuple(parts),
        committed=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
    )
