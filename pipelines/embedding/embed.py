"""``crem embed``: items become vectors, in a Ray Data actor pool with one model per actor.

The input is cut into *shards* of about five hundred rows; a shard is read, embedded and written by one actor as one
Parquet file, whole or not at all. That makes resuming simple and exact: what is missing is the shards whose file is not
there. ``plan.json`` names the model's fingerprint and the input files; a run into a folder whose plan differs is
refused with both named. While the model computes one batch, a thread reads and prepares the next.

A bad item is a row with a null embedding and its error: rows in = rows out, always.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from crem.config import EmbedConfig, RunConfig
from crem.data.sequence import PreparedSequence
from crem.errors import CheckpointError, ConfigError, ResourceError
from pipelines.corpus import sources
from pipelines.corpus.image_reader import ImageReader
from pipelines.corpus.sources import Piece, Source
from pipelines.embedding import item_table as items
from pipelines.embedding.item_table import Loaded
from pipelines.tables import schema, session
from pipelines.tables.manifest import read_manifest
from pipelines.tables.models import load_model
from pipelines.tables.storage import Folder

__all__ = ["embed"]

log = logging.getLogger(__name__)

KIND = "embed"
PLAN = "plan.json"
MANIFEST = "manifest.json"

_SHARD_ROWS = 512
_LOG_EVERY_S = 10.0


def embed(model: str, source: str, out: str, config: RunConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Embed every item of ``source`` with the checkpoint ``model``.

    Args:
        model: checkpoint folder or URI.
        source: a Parquet or JSONL file, a folder of them, or a prepared folder (its image table).
        out: folder or URI; a run that was interrupted continues there.
        fresh: first remove what an earlier embedding run left in ``out``.

    Returns:
        ``rows_in``, ``rows_out``, ``embedded``, ``errors``, ``resumed``, ``items_per_s``, ``fingerprint``, ``dim``.

    Raises:
        ConfigError: nothing to embed; ``out`` belongs to another model, other input or another job; or a node of the
            cluster does not see a local ``source``, ``model`` or ``out``.
        CheckpointError: ``model`` cannot be loaded.
    """
    table = _table(source)
    target = Folder.at(out)
    pieces = sources.split(table, items.COLUMNS, _SHARD_ROWS)
    shards = sources.group(pieces, _SHARD_ROWS)
    if not shards:
        raise ConfigError(f"{source!r} has no rows; there is nothing to embed")
    reader = ImageReader.of(table.root, config.model.image)
    session.connect()
    session.require(
        f"embedding with {config.embed.min_actors} actors",
        cpus=config.embed.min_actors * config.embed.cpus_per_actor,
        gpus=config.embed.min_actors * config.embed.gpus_per_actor,
        remedy="lower embed.min_actors, embed.cpus_per_actor or embed.gpus_per_actor",
    )
    session.require_readable(table.rows, *table.names)
    session.require_readable(table.root, *reader.files)
    session.require_readable_model(model)
    with session.remote_errors():
        plan = {**_describe(model, config.embed), "files": sources.stamp(table)}
        plan["shards"] = [sum(piece.rows for piece in shard) for shard in shards]
        _claim(target, plan, fresh=fresh)
        return _run(model, target, plan, shards, reader, config.embed)


def _table(source: str) -> Source:
    """The item table at ``source``; of prepared tables that is ``images/``, and they must be complete."""
    folder = Folder.at(source)
    if folder.exists("rejected"):
        read_manifest(folder)
        return sources.find(folder.child("images").uri, what="image table")
    return sources.find(source, what="item table")


def _describe(model: str, config: EmbedConfig) -> dict[str, Any]:
    """What the checkpoint is, asked where it will run; a bad one fails here, in words."""
    from crem.checkpoint import describe

    task = ray.remote(num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor)(describe)
    return {**asdict(ray.get(task.remote(model, config.chorus_tokens))), "model": model}


def _claim(target: Folder, plan: dict[str, Any], *, fresh: bool) -> None:
    """Make ``target`` the output of this plan, or refuse it if it is that of another."""
    target.claim(KIND)
    session.require_shared(target)
    held = None if fresh else target.read_json(PLAN)
    if held is None and not fresh and target.exists(PLAN):
        raise ConfigError(f"{target.uri}/{PLAN} is damaged; give --fresh to embed all anew, or choose another --out")
    if held is None:
        target.remove(MANIFEST)
        for name in target.files(".parquet"):
            target.remove(name)
    elif held["fingerprint"] != plan["fingerprint"]:
        raise ConfigError(
            f"{target.uri} holds embeddings of model {held['fingerprint']} ({held['model']}), and this model is "
            f"{plan['fingerprint']} ({plan['model']}); choose another --out, or remove that folder"
        )
    elif (held["files"], held["shards"]) != (plan["files"], plan["shards"]):
        raise ConfigError(
            f"{target.uri} was begun from other input: {_difference(held['files'], plan['files'])}; "
            "choose another --out, or remove that folder"
        )
    target.write_json(plan, PLAN)


def _difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    changed = [f for f in now if f not in before] or [f for f in before if f not in now]
    return ", ".join(f"{f['file']} ({f['size']} bytes)" for f in changed[:3]) or "cut into other shards"


def _run(
    model: str,
    target: Folder,
    plan: dict[str, Any],
    shards: list[list[Piece]],
    reader: ImageReader,
    config: EmbedConfig,
) -> dict[str, Any]:
    began = said = time.monotonic()
    rows_in = sum(plan["shards"])
    counts = {"embedded": 0, "errors": 0}
    missing: list[dict[str, Any]] = []
    for index, shard in enumerate(shards):
        done = _finished(target, index, plan)
        if done is None:
            missing.append({"shard": index, "pieces": json.dumps([piece.to_dict() for piece in shard])})
        else:
            counts = {name: counts[name] + done[name] for name in counts}
    resumed = sum(counts.values())
    log.info("embedding %d items with %s, %d already done", rows_in, plan["fingerprint"], resumed)
    if missing:
        target.remove(MANIFEST)
    for result in _embed_shards(model, target, plan, missing, reader, config):
        counts = {name: counts[name] + result[name] for name in counts}
        if time.monotonic() - said > _LOG_EVERY_S:
            said = time.monotonic()
            new = sum(counts.values()) - resumed
            log.info(
                "%d of %d items, %d errors, %.0f items/s",
                new + resumed,
                rows_in,
                counts["errors"],
                new / (said - began),
            )
    rows_out = sum(counts.values())
    if rows_out != rows_in:
        raise RuntimeError(f"{rows_in} items went in and {rows_out} came out")
    unseen = sorted({part_name(shard) for shard in range(len(shards))} - set(target.files(".parquet")))
    if unseen:  # written by a node that joined during the run
        raise ConfigError(
            f"{target.uri} lacks {len(unseen)} of {len(shards)} parts that were written ({unseen[0]} …): not all nodes "
            "share it; run again with --out on a file system that all nodes share, or an s3:// URI"
        )
    seconds = time.monotonic() - began
    summary = {
        "kind": KIND,
        **{name: plan[name] for name in ("fingerprint", "dim", "model")},
        "rows_in": rows_in,
        "rows_out": rows_out,
        **counts,
        "resumed": resumed,
        "items_per_s": round((rows_out - resumed) / seconds, 1),
    }
    target.write_json(summary, MANIFEST)
    log.info("embedded %d items (%d errors, %d resumed) in %.1f s", rows_out, counts["errors"], resumed, seconds)
    return summary


def _embed_shards(
    model: str,
    target: Folder,
    plan: dict[str, Any],
    missing: list[dict[str, Any]],
    reader: ImageReader,
    config: EmbedConfig,
) -> Iterator[dict[str, Any]]:
    if not missing:
        return
    most = min(config.max_actors, len(missing))
    dataset = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
        ShardEmbedder,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(config.min_actors, most), max_size=most),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        fn_constructor_args=(model, target, plan["fingerprint"], reader, config),
    )
    yield from session.results(dataset)


def part_name(shard: int) -> str:
    return f"part-{shard:06d}.parquet"


def _finished(target: Folder, shard: int, plan: dict[str, Any]) -> dict[str, int] | None:
    """Counts of a shard that an earlier run wrote, or ``None`` where it has to be done."""
    name = part_name(shard)
    if not target.exists(name):
        return None
    try:
        with target.open(name) as file:
            stamp, errors = _stamp_and_errors(file)
    except (pa.ArrowException, OSError):
        data = target.read_bytes(name)  # a storage that fails raises here again: only the file itself can be damaged
        try:
            stamp, errors = _stamp_and_errors(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            log.warning("%s is damaged (%s) and is embedded again", target.path(name), error)
            return None
    if stamp.get("fingerprint") != plan["fingerprint"] or len(errors) != plan["shards"][shard]:
        return None
    return {"embedded": errors.null_count, "errors": len(errors) - errors.null_count}


def _stamp_and_errors(file: Any) -> tuple[dict[str, Any], pa.ChunkedArray]:
    """What model a part is of, and its column of errors; reads all of it, and checks the pages' checksums."""
    written = pq.ParquetFile(file, page_checksum_verification=True)
    stamp = json.loads((written.schema_arrow.metadata or {}).get(b"crem", b"{}"))
    return stamp, written.read()["error"]


class ShardEmbedder:
    """The actor: one model, embeds a shard per call."""

    def __init__(self, model: str, target: Folder, fingerprint: str, reader: ImageReader, config: EmbedConfig):
        self.model = load_model(model, config.threads_per_actor, config.chorus_tokens)
        self.fingerprint = fingerprint
        self.place = model
        self.target = target
        self.reader = reader
        self.batch_size = config.batch_size
        self.schema = schema.embeddings(
            self.model.dim, fingerprint=fingerprint, model=model, chorus_tokens=self.model.chorus_tokens
        )
        self.read_ahead = ThreadPoolExecutor(1)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        shards = (partial(self.embed_shard, row["shard"], json.loads(row["pieces"])) for row in rows)
        return pa.Table.from_pylist([session.attempt(shard) for shard in shards])

    def embed_shard(self, shard: int, pieces: list[dict[str, Any]]) -> dict[str, int]:
        """Embed the rows of ``pieces`` and write them as one file; returns the counts."""
        if self.model.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{self.place} changed during the run: it was {self.fingerprint} and is {self.model.fingerprint}; "
                "run again once nothing writes to it"
            )
        parts = [self._embed(loaded) for loaded in self._batches(pieces)]
        table = pa.concat_tables(parts)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.target.write_bytes(sink.getvalue().to_pybytes(), part_name(shard))
        embedded = table["error"].null_count
        return {"embedded": embedded, "errors": table.num_rows - embedded}

    def _batches(self, pieces: list[dict[str, Any]]) -> Iterator[list[Loaded]]:
        """Batches of prepared items; the next one is prepared while the caller embeds the last."""
        limits = self.model.config.image
        loaded = (
            items.load_item(record, self.reader, limits, self.model.prepare)
            for piece in pieces
            for record in sources.read(Piece.from_dict(piece), items.COLUMNS)
        )
        following = self.read_ahead.submit(lambda: list(islice(loaded, self.batch_size)))
        while batch := following.result():
            following = self.read_ahead.submit(lambda: list(islice(loaded, self.batch_size)))
            yield batch

    def _embed(self, batch: list[Loaded]) -> pa.Table:
        dim = self.model.dim
        values = np.zeros((len(batch), dim), np.float32)
        places = [place for place, row in enumerate(batch) if row.sequence is not None]
        values[places] = self._vectors([row.sequence for row in batch if row.sequence is not None])
        errors = [row.error for row in batch]
        null = pa.array([error is not None for error in errors])
        columns = [
            pa.array([row.id for row in batch], pa.int64()),
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dim, mask=null),
            pa.array(errors, pa.string()),
            pa.array([row.uri for row in batch], pa.string()),
            pa.array([row.text for row in batch], pa.string()),
        ]
        return pa.table(columns, schema=self.schema)

    def _vectors(self, sequences: list[PreparedSequence]) -> NDArray[np.float32]:
        try:
            return self.model.embed_prepared(sequences, batch_size=self.batch_size)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                raise ResourceError(
                    f"a batch of {len(sequences)} items does not fit in memory: {error}; lower embed.batch_size"
                ) from error
            raise
