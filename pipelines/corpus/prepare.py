"""``crem prepare``: a raw corpus becomes prepared tables.

Four steps, each of which continues where an interrupted run stopped; images never pass through the driver or the
object store.

1. *Plan* (``work_plan``): the corpus in pieces of rows, written to ``_work/<version>/`` of the output.
2. *Stage* (``staging``): a Ray Data task per piece reads its rows, validates them, decodes and re-encodes each image
   once, and writes files and a ledger of ids. A piece that has a ledger is done.
3. *Resolve* (``decisions``): which rows and images are left out, a task per group of pieces.
4. *Commit* (``commit``): a task per final part merges staged files; then the manifest is swapped in (``publish``).

The driver holds nothing for each row, nor for each piece; ``tests/bench/README.md`` has what it holds.

The version is a hash of the input, the settings and the versions of the programs: the same version is the same bytes.
Until the manifest is swapped the output stays what it was. One job at a time holds the lease of the output.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import JsonValue

from crem.config import ImageConfig, RunConfig
from crem.errors import ConfigError
from pipelines.corpus.card import write_card
from pipelines.corpus.commit import commit
from pipelines.corpus.corpus_place import require_outside, require_raw
from pipelines.corpus.curation import CHOSEN, identity, publish_clusters
from pipelines.corpus.ledger import staged_pieces
from pipelines.corpus.publish import finished, foreign_files, made_with, manifest_of, publish, remove_old, remove_work
from pipelines.corpus.resolve import resolve
from pipelines.corpus.staging import PieceCounts, stage
from pipelines.corpus.staging_progress import StagingProgress
from pipelines.corpus.table_statistics import TableStatistics
from pipelines.corpus.token_limit import open_tokenizer
from pipelines.corpus.work_plan import WORK, DraftPlan, WorkPlan, draft_plan, identity_of, plan_by_tasks, read_pieces
from pipelines.duplicates.decide import check_settings
from pipelines.formats.detection import Detection, detect_source
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.sources import SourceFiles
from pipelines.tables import ray_tasks, session
from pipelines.tables.lease import Lease
from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.richness import shrunk_images
from pipelines.tables.shared_folders import require_readable, require_readable_model, require_shared
from pipelines.tables.storage import Folder, JobKind

__all__ = ["prepare"]

log = logging.getLogger(__name__)

_START_PATIENCE_S = 20.0
"""How long the first look at the output waits: storage that is not there at all is more likely a wrong address."""
_LOOKED_FOR = 1000
"""Files of the corpus that every node must see."""


def prepare(source: str, out: str, config: RunConfig, *, fresh: bool = False) -> PrepareManifest:
    """Prepare the raw corpus at ``source`` into ``out`` (paths or URIs).

    Args:
        fresh: prepare anew, even if the output is complete or an interrupted run could continue.

    Raises:
        ConfigError: there is no corpus or no usable row in it; ``out`` holds something else, or another job writes into
            it; or a node of the cluster does not see a local ``source`` or ``out``.
        StorageError: the storage of ``out`` stayed away. The same command continues.
        ResourceError: another job took the output over.
    """
    began = time.monotonic()
    corpus = sources.find(source)
    require_raw(source)
    require_outside(source, corpus, out)
    target = Folder.at(out).patient(config.prepare.storage_patience_s)
    reader = ImageReader.of(corpus.root, _decoding_limits(config), config.prepare, corpus.archives)
    check_settings(config.prepare)
    detection = detect_source(corpus, config.prepare, section="prepare")
    archives = [[a.name, a.size] for a in reader.archives]
    plan_id = identity_of(corpus, [_settings(config), made_with(), archives, identity(config.prepare)])
    start = target.patient(min(_START_PATIENCE_S, target.patience_s))
    old = finished(start, plan_id)
    if old is not None and not fresh:
        return _nothing_to_do(target, old)
    draft = draft_plan(corpus, config.prepare.rows_per_task, None)
    if draft is not None and not draft.records:
        raise _no_rows(corpus)
    session.connect()
    if config.prepare.tokenizer is not None:
        require_readable_model(config.prepare.tokenizer)
        open_tokenizer(config.prepare.tokenizer)
    require_readable(corpus.folder, *corpus.some_names(_LOOKED_FOR))
    require_readable(corpus.root, *reader.files)
    start.claim(JobKind.PREPARE)
    require_shared(target)
    version = plan_id if old is None else _next_version(old)
    with Lease.take(target, JobKind.PREPARE) as lease, ray_tasks.remote_errors():
        job = _Job(target, target.child(WORK).child(version), version, corpus, detection, reader, config, lease)
        manifest = job.run(plan_id, draft, fresh=fresh)
    _say(manifest, time.monotonic() - began)
    return manifest


def _no_rows(corpus: SourceFiles) -> ConfigError:
    return ConfigError(f"{corpus.root.uri} has {len(corpus)} files and not one row in them; fill it first")


def _decoding_limits(config: RunConfig) -> ImageConfig:
    """Images are stored as large as ``encode_max_pixels`` allows, whatever size the model reads."""
    return config.model.image.model_copy(update={"max_pixels": config.prepare.encode_max_pixels})


def _settings(config: RunConfig) -> dict[str, JsonValue]:
    """The settings that decide the output."""
    chosen = config.prepare.model_dump(mode="json", exclude={"storage_patience_s"})
    return {"prepare": chosen, "image": config.model.image.model_dump(mode="json")}


def _nothing_to_do(target: Folder, manifest: PrepareManifest) -> PrepareManifest:
    log.info("%s holds the tables of this corpus and these settings already; nothing to do", target.uri)
    if target.exists(WORK) or foreign_files(target, manifest):  # of a job that was killed after it had finished
        with Lease.take(target, JobKind.PREPARE):
            remove_old(target, manifest)
    return manifest


def _next_version(old: PrepareManifest) -> str:
    """A version for the same plan once more, whose parts do not overwrite those that are being read."""
    count = old.version.removeprefix(old.plan).removeprefix(".") or "0"
    return f"{old.plan}.{int(count) + 1}"


@dataclass(frozen=True)
class _Job:
    """A preparation that holds the lease of its output."""

    target: Folder
    work: Folder
    version: str
    corpus: SourceFiles
    detection: Detection
    reader: ImageReader
    config: RunConfig
    lease: Lease

    def run(self, plan_id: str, draft: DraftPlan | None, *, fresh: bool) -> PrepareManifest:
        """All steps."""
        work = self.target.child(WORK)
        for other in work.folders():
            if fresh or other != self.version:
                remove_work(work, other)
        plan = self._plan(draft)
        self._stage(plan)
        resolve(self.work, plan, self.config.prepare)
        found = commit(plan, out=self.target, work=self.work, version=self.version, after_each=self.lease.check)
        if not found.statistics.rows:
            raise self._nothing_usable(found.rows_in, found.statistics)
        manifest = manifest_of(
            found.statistics,
            plan=plan_id,
            version=self.version,
            records_in=plan.records,
            rows_in=found.rows_in,
            unknown_columns=dict(sorted(found.unknown.counts.items())),
            layouts=self.detection.mapping(),
            source_uri=self.corpus.root.uri,
            config=_settings(self.config),
            parts=found.parts,
        )
        accounted = manifest.rows_out + manifest.rejected + manifest.filtered
        if accounted != manifest.rows_in:
            raise RuntimeError(f"{manifest.rows_in} rows went in and {accounted} are accounted for: {manifest}")
        for line in self.detection.warnings(found.unknown):
            log.warning("%s", line)
        self.lease.check()
        publish_clusters(self.target, self.work, self.version)
        publish(self.target, manifest, found.statistics, found.parts)
        write_card(self.target, manifest, found.statistics, chosen=self.work.child(CHOSEN))
        remove_old(self.target, manifest)
        return manifest

    def _plan(self, draft: DraftPlan | None) -> WorkPlan:
        plan = WorkPlan.read(self.work)
        if plan is None and draft is not None:
            plan = draft.write(self.work)
        if plan is None:
            plan = plan_by_tasks(self.corpus, self.config.prepare.rows_per_task, None, self.work)
        if not plan.records:
            raise ConfigError(
                f"{self.corpus.root.uri} has {len(self.corpus)} files and not one row in them; fill it first"
            )
        return plan

    def _stage(self, plan: WorkPlan) -> None:
        done = staged_pieces(self.work, plan)
        if len(done):
            log.info("continuing: %d of %d pieces are staged already", len(done), plan.pieces)
        if len(done) == plan.pieces:
            return
        is_done = np.zeros(plan.pieces, np.bool_)
        is_done[done] = True
        log.info("preparing %d records of %d files from %s", plan.records, len(self.corpus), self.corpus.root.uri)
        run = partial(
            stage,
            work=self.work,
            source=self.corpus.root.name,
            rows_folder=self.corpus.folder.uri.removeprefix(self.corpus.root.uri).strip("/"),
            detection=self.detection,
            reader=self.reader,
            config=self.config,
        )
        pieces = (piece for piece in read_pieces(self.work, plan) if not is_done[piece.number])
        staged = 0
        with StagingProgress(plan.records, plan.records * len(done) // plan.pieces) as progress:
            for counts in ray_tasks.stream(run, pieces, together=plan.pieces_at_once):
                assert isinstance(counts, PieceCounts)
                progress.add(counts)
                staged += 1
                self.lease.check()
        if staged != plan.pieces - len(done):
            raise RuntimeError(f"{staged} of {plan.pieces - len(done)} pieces came back")

    def _nothing_usable(self, rows_in: int, statistics: TableStatistics) -> ConfigError:
        reasons = {reason: n for found in statistics.left_out.values() for reason, n in found.items()}
        rejected = f"{self.target.uri}/rejected/part-*-{self.version}.parquet"
        return ConfigError(
            f"none of the {rows_in} rows can be used: {reasons}; {rejected} says why for each; "
            "the output is what it was before"
        )


def _say(manifest: PrepareManifest, seconds: float) -> None:
    for split, rows in manifest.unread_splits.items():
        log.warning(
            "%d rows are of split %r, which no job reads: training reads train…, validation validation…, evaluation "
            "test…; name the split so that it begins with one of them",
            rows,
            split,
        )
    if (line := shrunk_images(manifest)) is not None:
        log.info("%s", line)
    log.info(
        "prepared %d rows in = %d out + %d rejected + %d filtered; %d images; %.1f s, %.0f rows/s",
        manifest.rows_in,
        manifest.rows_out,
        manifest.rejected,
        manifest.filtered,
        manifest.images,
        seconds,
        manifest.rows_in / seconds,
    )
