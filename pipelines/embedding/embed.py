"""``crem embed``: items become vectors, in a Ray Data actor pool with one model per actor.

The input is split into *shards* of about five hundred rows. One actor reads, embeds and writes a shard as one Parquet
file, completely or not at all. That makes resuming simple and exact: the shards whose file is missing are embedded.
While the model computes one batch, a thread reads and prepares the next.

A bad item is a row with a null embedding and its error: rows in = rows out, always.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from numpy.typing import NDArray

from crem.config import EmbedConfig, RunConfig
from crem.data.sequence import CutCount, PreparedSequence
from crem.errors import CheckpointError, ConfigError, ResourceError
from pipelines.embedding import item_table as items
from pipelines.embedding.item_table import LoadedItem
from pipelines.embedding.output import (
    EmbedManifest,
    EmbedPlan,
    EmbedShard,
    ShardCounts,
    finished_part,
    first_error,
    part_name,
    start_or_resume,
    write_part,
)
from pipelines.formats.detection import Detection, detect_source
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import RowRange
from pipelines.sources.sources import SourceFiles
from pipelines.tables import ray_tasks, schema, session
from pipelines.tables.manifest import table_parts
from pipelines.tables.models import describe_model, load_model
from pipelines.tables.richness import warn_of_small_images
from pipelines.tables.shared_folders import require_readable, require_readable_model, require_shared
from pipelines.tables.storage import Folder, JobKind

__all__ = ["embed"]

log = logging.getLogger(__name__)

_SHARD_ROWS = 512
_LOG_EVERY_S = 10.0


def embed(model: str, source: str, out: str, config: RunConfig, *, fresh: bool = False) -> EmbedManifest:
    """Embed every item of ``source`` with the checkpoint ``model``.

    Args:
        model: checkpoint folder or URI.
        source: items in any format and container that ``crem prepare`` reads, or a prepared folder (its image table).
        out: folder or URI; a run that was interrupted continues there.
        fresh: first remove what an earlier embedding run left in ``out``.

    Raises:
        ConfigError: there is nothing to embed, its format is not known, or not one item could be embedded; ``out``
            belongs to another model, other input or another job; or a node of the cluster does not see a local
            ``source``, ``model`` or ``out``.
        CheckpointError: ``model`` cannot be loaded.
    """
    table = _item_table(source)
    target, settings = Folder.at(out), config.embed
    detection = detect_source(table, settings, section="embed")
    for warning in detection.warnings():
        log.warning("%s", warning)
    ranges = sources.split(table, None, _SHARD_ROWS)
    shards = [EmbedShard(number, group) for number, group in enumerate(sources.group(ranges, _SHARD_ROWS))]
    if not shards:
        raise ConfigError(f"{source!r} has no rows; there is nothing to embed")
    reader = ImageReader.of(table.root, config.model.image, settings, table.archives)
    session.connect()
    session.require(
        f"embedding with {settings.min_actors} actors",
        cpus=settings.min_actors * settings.cpus_per_actor,
        gpus=settings.min_actors * settings.gpus_per_actor,
        remedy="lower embed.min_actors, embed.cpus_per_actor or embed.gpus_per_actor",
    )
    require_readable(table.folder, *table.names)
    require_readable(table.root, *reader.files)
    require_readable_model(model)
    with ray_tasks.remote_errors():
        description = describe_model(
            model,
            cpus=settings.cpus_per_actor,
            gpus=settings.gpus_per_actor,
            chorus_tokens=settings.chorus_tokens,
        )
        if Folder.at(source).exists("rejected"):
            warn_of_small_images(source, description.max_pixels)
        plan = EmbedPlan(
            fingerprint=description.fingerprint,
            dim=description.dim,
            chorus_tokens=description.chorus_tokens,
            model=model,
            files=sources.stamps(table),
            reading=detection.reading(),
            shards=tuple(sum(rows.rows for rows in shard.ranges) for shard in shards),
        )
        target.claim(JobKind.EMBED)
        require_shared(target)
        start_or_resume(target, plan, fresh=fresh)
        manifest = _run(target, plan, shards, reader, detection, settings, description.max_text_tokens)
    if not manifest.embedded:
        raise ConfigError(
            f"none of the {manifest.rows_in} items could be embedded: {first_error(target)}; the column error of "
            f"{target.uri} says why for each; mend them and run again with --fresh"
        )
    return manifest


def _item_table(source: str) -> SourceFiles:
    """The files to embed; of prepared tables the parts of ``images/`` that the manifest lists."""
    folder = Folder.at(source)
    if not folder.exists("rejected"):
        return sources.find(source, what="item table")
    parts = table_parts(folder, "images")
    found = sources.find(folder.child("images").uri, what="image table")
    listed = found.table.filter(pc.is_in(found.table["name"], value_set=pa.array(parts, pa.string())))
    if missing := set(parts) - set(listed["name"].to_pylist()):
        raise ConfigError(f"{folder.uri}/images/{min(missing)} is missing; run crem prepare again")
    return replace(found, table=listed.combine_chunks())


def _run(
    target: Folder,
    plan: EmbedPlan,
    shards: list[EmbedShard],
    reader: ImageReader,
    detection: Detection,
    config: EmbedConfig,
    max_text_tokens: int,
) -> EmbedManifest:
    """Embed the shards that have no finished part, and write the manifest."""
    began = logged = time.monotonic()
    rows_in = sum(plan.shards)
    parts = [finished_part(target, shard.number, plan) for shard in shards]
    finished = [counts for counts in parts if counts is not None]
    missing = [shard for shard, counts in zip(shards, parts, strict=True) if counts is None]
    embedded, errors = (sum(getattr(counts, name) for counts in finished) for name in ("embedded", "errors"))
    cuts = sum((counts.cuts for counts in finished), CutCount())
    unknown = UnknownColumns()
    resumed = embedded + errors
    log.info("embedding %d items with %s, %d already done", rows_in, plan.fingerprint, resumed)
    if missing:
        target.remove(EmbedManifest.FILE)
    for counts in _embed_shards(target, plan, missing, reader, detection, config):
        unknown.merge(counts.unknown)
        embedded, errors, cuts = embedded + counts.embedded, errors + counts.errors, cuts + counts.cuts
        if time.monotonic() - logged > _LOG_EVERY_S:
            logged = time.monotonic()
            done = embedded + errors
            rate = (done - resumed) / (logged - began)
            log.info("%d of %d items, %d errors, %.0f items/s", done, rows_in, errors, rate)
    rows_out = embedded + errors
    if rows_out != rows_in:
        raise RuntimeError(f"{rows_in} items went in and {rows_out} came out")
    absent = sorted({part_name(shard.number) for shard in shards} - set(target.files(".parquet")))
    if absent:  # written by a node that joined during the run
        raise ConfigError(
            f"{target.uri} lacks {len(absent)} of {len(shards)} parts that were written ({absent[0]} …): not all nodes "
            "share it; run again with --out on a file system that all nodes share, or an s3:// URI"
        )
    for warning in sorted(set(detection.warnings(unknown)) - set(detection.warnings())):
        log.warning("%s", warning)
    seconds = time.monotonic() - began
    manifest = EmbedManifest(
        fingerprint=plan.fingerprint,
        dim=plan.dim,
        model=plan.model,
        rows_in=rows_in,
        rows_out=rows_out,
        embedded=embedded,
        errors=errors,
        resumed=resumed,
        items_per_s=round((rows_out - resumed) / seconds, 1),
        cut=cuts.cut,
        longest_text=cuts.longest,
        max_text_tokens=max_text_tokens,
    )
    manifest.write(target)
    log.info("embedded %d items (%d errors, %d resumed) in %.1f s", rows_out, errors, resumed, seconds)
    return manifest


def _embed_shards(
    target: Folder,
    plan: EmbedPlan,
    missing: list[EmbedShard],
    reader: ImageReader,
    detection: Detection,
    config: EmbedConfig,
) -> Iterator[ShardCounts]:
    if not missing:
        return
    most = min(config.max_actors, len(missing))
    dataset = ray_tasks.task_dataset(missing).map_batches(
        ShardEmbedder,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(config.min_actors, most), max_size=most),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        fn_constructor_args=(target, plan, reader, detection, config),
    )
    yield from ray_tasks.results(dataset)


class ShardEmbedder:
    """The actor: one model, embeds a shard per call."""

    def __init__(self, target: Folder, plan: EmbedPlan, reader: ImageReader, detection: Detection, config: EmbedConfig):
        self.model = load_model(plan.model, config.threads_per_actor, config.chorus_tokens)
        self.plan = plan
        self.target = target
        self.reader = reader
        self.detection = detection
        self.batch_size = config.batch_size
        self.schema = schema.embeddings(
            schema.EmbeddingStamp(plan.fingerprint, self.model.dim, plan.model, self.model.chorus_tokens)
        )
        self.read_ahead = ThreadPoolExecutor(1)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [ray_tasks.attempt(self.embed_shard, shard) for shard in batch[ray_tasks.TASK].to_pylist()]
        )

    def embed_shard(self, shard: EmbedShard) -> ShardCounts:
        """Embed the rows of a shard and write them as one part."""
        if self.model.fingerprint != self.plan.fingerprint:
            raise CheckpointError(
                f"{self.plan.model} changed during the run: it was {self.plan.fingerprint} and is "
                f"{self.model.fingerprint}; run again once nothing writes to it"
            )
        self.cuts = CutCount()
        self.records = RecordReader(self.detection, "items")
        table = pa.concat_tables([self._embed(batch) for batch in self._batches(shard.ranges)])
        counts = write_part(self.target, shard.number, table, self.cuts)
        return replace(counts, unknown=self.records.unknown)

    def _batches(self, ranges: tuple[RowRange, ...]) -> Iterator[list[LoadedItem]]:
        """Batches of prepared items; the next one is prepared while the caller embeds the last."""
        limits = self.model.config.image
        loaded = (
            items.load_item(row, self.records, self.reader, limits, self.model.prepare)
            for rows in ranges
            for row in sources.read(rows, None)
        )
        following = self.read_ahead.submit(lambda: list(islice(loaded, self.batch_size)))
        while batch := following.result():
            following = self.read_ahead.submit(lambda: list(islice(loaded, self.batch_size)))
            yield batch

    def _embed(self, batch: list[LoadedItem]) -> pa.Table:
        dim = self.model.dim
        values = np.zeros((len(batch), dim), np.float32)
        places = [place for place, row in enumerate(batch) if row.sequence is not None]
        sequences = [row.sequence for row in batch if row.sequence is not None]
        values[places] = self._vectors(sequences)
        self.cuts += CutCount.of(sequences)
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
