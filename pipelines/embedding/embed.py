"""``crem embed``: items become vectors, in a Ray Data pipeline with one model per accelerator.

1. *Plan* (``pipelines.corpus.work_plan``): the input in pieces of rows, written to ``_work`` of the output.
2. *Embed*: tasks read and prepare the items of pieces (``windows``), actors with the model embed them
   (``window_embedder``) and write staged files. All pieces flow through one execution, so that no accelerator waits at
   the end of a shard.
3. *Commit* (``shard_commit``): a shard whose pieces are all staged becomes parts and a ledger, beside the rest.

Each step continues where an interrupted run stopped: a shard with a ledger is done, and so is a piece that is staged.
A bad item is a row with a null vector and its error: rows in = rows out, always. One job at a time holds the lease.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from crem.checkpoint import read_collator
from crem.config import EmbedConfig, RunConfig
from crem.data.collator import Collator
from crem.errors import ConfigError
from pipelines.corpus import work_plan as plans
from pipelines.corpus.corpus_place import require_outside
from pipelines.corpus.work_plan import WORK, DraftPlan, WorkPlan, draft_plan, identity_of, plan_by_tasks, read_pieces
from pipelines.embedding.embed_progress import EmbedProgress
from pipelines.embedding.embed_run import EmbedRun
from pipelines.embedding.grow import grow_output, grown_already
from pipelines.embedding.input_files import write_input_files
from pipelines.embedding.item_loading import LoaderSettings
from pipelines.embedding.item_table import item_files
from pipelines.embedding.lance_dataset import commit_dataset, dataset_faults, withdraw_dataset
from pipelines.embedding.live_parts import Growth
from pipelines.embedding.output import (
    PART_FOLDERS,
    EmbedManifest,
    EmbedPlan,
    ShardLedger,
    check_plan,
    ledger_file,
    read_ledgers,
)
from pipelines.embedding.output_columns import OutputColumns
from pipelines.embedding.result_columns import OutputTypes
from pipelines.embedding.verify_embeddings import (
    damaged_shards,
    remove_output,
    remove_shard,
    remove_strangers,
    repeated_ids,
    stray_parts,
)
from pipelines.formats.detection import Detection, detect_source
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.sources import SourceFiles
from pipelines.tables import ray_tasks, schema, session
from pipelines.tables.cluster_resources import Need, ResourceWatch, wait_for_resources
from pipelines.tables.lease import Lease
from pipelines.tables.models import ModelLoader, describe_model, load_model
from pipelines.tables.part_reads import in_threads
from pipelines.tables.richness import warn_of_small_images
from pipelines.tables.shared_folders import require_readable, require_readable_model, require_shared
from pipelines.tables.storage import Folder, JobKind
from pipelines.tables.storage_retry import TIMEOUT_S

__all__ = ["embed"]

log = logging.getLogger(__name__)

_LOOKED_FOR = 1000
"""Files of the input that every node must see."""


def embed(
    model: str,
    source: str,
    out: str,
    config: RunConfig,
    *,
    fresh: bool = False,
    repair: bool = False,
    grow: bool = False,
    load: ModelLoader = load_model,
    read: Callable[[str], Collator] = read_collator,
) -> EmbedManifest:
    """Embed every item of ``source`` with the checkpoint ``model``.

    Args:
        model: checkpoint folder or URI.
        source: items in any format and container that ``crem prepare`` reads, or a prepared folder (its image table).
        out: folder or URI; a run that was interrupted continues there, and one that is complete does nothing.
        fresh: first remove what an earlier embedding run left in ``out``.
        repair: read all parts that are done, and embed the shards anew of which one is missing or damaged.
        grow: ``out`` may be of an earlier state of ``source``: embed what is new or changed since (``grow``).
        load, read: make the model of an actor and the collator of a task; benchmarks of the job alone have others.

    Raises:
        ConfigError: there is nothing to embed, its format is not known, or not one item could be embedded; ``out``
            belongs to another model, other input or another job, or a job writes there; or a node of the cluster does
            not see a local ``source``, ``model`` or ``out``.
        CheckpointError: ``model`` cannot be loaded. StorageError: storage stayed away; the same command continues.
    """
    settings = config.embed
    if grow and settings.output_format == "lance":
        raise ConfigError(
            "--grow leaves rows that are gone in their parts, and a reader of a Lance dataset would find them; grow an "
            "output of embed.output_format=parquet, and let crem index follow it: its Lance dataset has the rows that "
            "count. Or give --fresh in place of --grow"
        )
    table = item_files(source)
    require_outside(source, table, out)
    detection = detect_source(table, settings, section="embed")
    columns = OutputColumns.of(table, settings)
    draft = None if grow else draft_plan(table, settings.rows_per_task, None)
    if draft is not None and not draft.records:
        raise ConfigError(f"{source!r} has no rows; there is nothing to embed")
    reader = ImageReader.of(table.root, config.model.image, settings, table.archives)
    session.connect()
    wait_for_resources(
        "embedding",
        _needs(settings, settings.min_actors),
        remedy="lower embed.min_actors, embed.cpus_per_actor, embed.cpus_per_task or embed.gpus_per_actor",
    )
    require_readable(table.folder, *table.some_names(_LOOKED_FOR))
    require_readable(table.root, *reader.files)
    require_readable_model(model)
    with ray_tasks.remote_errors():
        description = describe_model(
            model, cpus=settings.cpus_per_actor, gpus=settings.gpus_per_actor, chorus_tokens=settings.chorus_tokens
        )
        if Folder.at(source).exists("rejected"):
            warn_of_small_images(source, description.max_pixels)
        types = OutputTypes.of(settings, description, model)
        row_schema = columns.schema(types.stamp, types.memory)
        read_by = detection.reading() | {"columns_out": columns.described()} | types.stamp.types()
        read_by["output_format"] = settings.output_format
        archives = [[archive.name, archive.size] for archive in reader.archives]
        plan = EmbedPlan(
            identity=identity_of(table, [archives, settings.rows_per_task]),
            fingerprint=description.fingerprint,
            dim=types.stamp.dim,
            chorus_tokens=description.chorus_tokens,
            model=model,
            source=source,
            files=len(table),
            bytes=pc.sum(table.table["size"]).as_py() or 0,
            settings=read_by,
            row_bytes=schema.row_bytes(row_schema),
        )
        target = Folder.at(out).patient(TIMEOUT_S)
        Folder.at(out).claim(JobKind.EMBED)
        require_shared(target)
        with Lease.take(target, JobKind.EMBED) as lease:

            def run(target: Folder, plan: EmbedPlan, table: SourceFiles, draft: DraftPlan | None) -> EmbedManifest:
                job = _Job(target, plan, table, detection, columns, row_schema, reader, settings, lease, load, read)
                return job.run(draft, description.max_text_tokens, repair=repair)

            if fresh:
                remove_output(target)
            grown = Growth.read(target)
            if grow and (grown is not None or EmbedManifest.read(target) is not None):
                return grow_output(target, plan, table, run, settings, repair=repair)
            if grown is not None:
                return grown_already(target, plan, grown, repair=repair)
            return run(target, plan, table, draft)


def _needs(settings: EmbedConfig, actors: int) -> list[Need]:
    return [
        Need("actor", settings.cpus_per_actor, settings.gpus_per_actor, actors),
        Need("task", settings.cpus_per_task, 0),
    ]


@dataclass(frozen=True)
class _Job:
    """An embedding that holds the lease of its output."""

    target: Folder
    plan: EmbedPlan
    table: SourceFiles
    detection: Detection
    columns: OutputColumns
    schema: pa.Schema
    reader: ImageReader
    config: EmbedConfig
    lease: Lease
    load: ModelLoader
    read: Callable[[str], Collator]

    @property
    def in_lance(self) -> bool:
        return self.config.output_format == "lance"

    def run(self, draft: DraftPlan | None, max_text_tokens: int, *, repair: bool) -> EmbedManifest:
        began, is_new = time.monotonic(), not check_plan(self.target, self.plan)
        earlier = EmbedManifest.read(self.target)
        self.plan.write(self.target)
        if repair:
            remove_strangers(self.target, self.plan)
        bad = damaged_shards(self.target, read_ledgers(self.target), self.plan, thoroughly=repair)
        done = [ledger for ledger in read_ledgers(self.target) if ledger.shard not in bad]
        whole = earlier is not None and not is_new and not bad and earlier.is_of(done)
        if earlier is not None and whole and not (self.in_lance and dataset_faults(self.target, done)):
            log.info("%s holds the vectors of this input already; nothing to do", self.target.uri)
            self.target.remove(WORK)
            return earlier.model_copy(update={"resumed": earlier.rows_in, "items_per_s": 0.0})
        self._warn(UnknownColumns())
        work = self.target.child(WORK).child(self.plan.identity)
        for other in self.target.child(WORK).folders():
            if other != self.plan.identity:
                self.target.remove(WORK, other)
        work_plan = WorkPlan.read(work) or (draft.write(work) if draft is not None else None)
        work_plan = work_plan or plan_by_tasks(self.table, self.config.rows_per_task, None, work)
        done = self._planned(done, work_plan, work, repair=repair)
        write_input_files(self.target, self.table, work, work_plan)
        self.target.remove(EmbedManifest.FILE)
        withdraw_dataset(self.target)
        run = EmbedRun(
            self.target,
            work,
            self.plan,
            work_plan,
            self.schema,
            self._loader(),
            self.config,
            self.lease.token,
            self.load,
        )
        resumed = run.start(done)
        log.info("embedding %d items with %s, %d already done", work_plan.records, self.plan.fingerprint, resumed)
        progress = EmbedProgress(self.target, work_plan.records, resumed, self.config, session.cpus())
        with progress, ResourceWatch("embedding", _needs(self.config, 1)):
            for _ in run.steps(progress):
                self.lease.check()
        return self._finish(work_plan, progress, resumed, max_text_tokens, time.monotonic() - began)

    def _planned(
        self, done: list[ShardLedger], work_plan: WorkPlan, work: Folder, *, repair: bool
    ) -> list[ShardLedger]:
        """The ledgers that fit the plan. A repair removes the others; their rows are counted only there."""
        rows = [ledger.rows for ledger in done]
        if repair:
            counts = Counter[int]()
            for piece in read_pieces(work, work_plan):
                counts[piece.number // plans.GROUP_PIECES] += sum(part.rows for part in piece.ranges)
            rows = [counts[ledger.shard] for ledger in done]
        fit: list[ShardLedger] = []
        for ledger, planned in zip(done, rows, strict=True):
            if ledger.shard < work_plan.groups and ledger.rows == planned:
                fit.append(ledger)
                continue
            name = f"{self.target.uri}/{ledger_file(ledger.shard)}"
            if not repair:
                raise ConfigError(f"the input has {work_plan.groups} shards, and {name} is of none; give --repair")
            log.warning("%s says %d rows, and the input has %d there; it is removed", name, ledger.rows, planned)
            remove_shard(self.target, ledger)
        return fit

    def _loader(self) -> LoaderSettings:
        return LoaderSettings(
            self.plan.model,
            self.plan.chorus_tokens,
            self.reader,
            self.detection,
            self.columns,
            self.config.item_timeout_s,
            self.config.item_attempts,
            self.read,
        )

    def _warn(self, unknown: UnknownColumns) -> None:
        """Say which columns are not read; those that are kept, or the id, are not among them."""
        kept = {*(column.name for column in self.columns.kept), *self.config.id}
        said = set(self.detection.warnings()) if unknown.counts else set()
        for line in self.detection.warnings(unknown):
            if line not in said and not any(line.startswith(f"column {name!r} ") for name in kept):
                log.warning("%s", line)

    def _finish(
        self, work_plan: WorkPlan, progress: EmbedProgress, resumed: int, max_text_tokens: int, seconds: float
    ) -> EmbedManifest:
        ledgers = read_ledgers(self.target)
        rows = sum(ledger.rows for ledger in ledgers)
        if len(ledgers) != work_plan.groups or rows != work_plan.records:
            raise RuntimeError(
                f"{work_plan.records} items in {work_plan.groups} shards went in, and {rows} in {len(ledgers)} came out"
            )
        if bad := damaged_shards(
            self.target, ledgers, self.plan, thoroughly=False
        ):  # written by a node that joined meanwhile
            raise ConfigError(
                f"{self.target.uri} lacks parts of {len(bad)} shards that were written: not all nodes share it; run "
                "again with --out on a file system that all nodes share, or an s3:// URI"
            )
        unknown = UnknownColumns()
        for ledger in ledgers:
            unknown.counts.update(ledger.unknown)
        self._warn(unknown)
        manifest = self._manifest(ledgers, progress, resumed, max_text_tokens, seconds)
        self.lease.confirm()
        if not manifest.embedded:
            raise ConfigError(
                f"none of the {rows} items could be embedded: {manifest.failed}; the column error of {self.target.uri}/"
                f"{PART_FOLDERS[self.config.output_format]} says why for each; mend them and run again with --fresh"
            )
        in_threads(self.target.remove, stray_parts(self.target, ledgers))
        if self.in_lance:
            commit_dataset(self.target, ledgers, self.schema)
        manifest.write(self.target)
        self.target.remove(WORK)
        if manifest.repeated_ids:
            log.warning("%d rows have an id that an earlier row has", manifest.repeated_ids)
        log.info("embedded %d items (%d errors, %d resumed) in %.1f s", rows, manifest.errors, resumed, seconds)
        return manifest

    def _manifest(
        self,
        ledgers: list[ShardLedger],
        progress: EmbedProgress,
        resumed: int,
        max_text_tokens: int,
        seconds: float,
    ) -> EmbedManifest:
        rows = sum(ledger.rows for ledger in ledgers)
        return EmbedManifest.of(
            self.plan,
            ledgers,
            resumed=resumed,
            items_per_s=round((rows - resumed) / seconds, 1),
            seconds=round(seconds, 1),
            idle=progress.idle(),
            cost=progress.entry().cost,
            repeated_ids=repeated_ids(self.target, ledgers),
            max_text_tokens=max_text_tokens,
        )
