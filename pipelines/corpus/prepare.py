"""``crem prepare``: a raw corpus becomes prepared tables.

Two passes, both streaming through Ray Data; images never pass through the driver or the object store.

1. *Stage* (``staging``): each task reads its ranges of rows, validates each row, decodes and re-encodes each image
   once, and writes rows, images and rejections to its own files under ``_staging/``. It returns a ledger of ids.
2. *Commit* (``commit``): the driver resolves duplicates from all ledgers, and each task's files become final parts.

A staged file counts only if its task's ledger arrived, so a task that died and ran again leaves nothing behind. The
manifest is written last; a killed run has none, and the next run into the same folder starts clean.
"""

from __future__ import annotations

import logging
import platform
import time
from functools import partial
from importlib import metadata

import numpy as np
from numpy.typing import NDArray

from crem.config import ImageConfig, RunConfig
from crem.errors import ConfigError
from pipelines.corpus.commit import TABLES, CommitCounts, commit, fill_empty_tables, resolve_duplicates
from pipelines.corpus.staging import STAGING, StagedLedger, StagingTask, stage
from pipelines.corpus.token_limit import open_tokenizer
from pipelines.formats.raw_rows import COLUMNS
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import RowRange
from pipelines.tables import ray_tasks, session
from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.richness import shrunk_images
from pipelines.tables.shared_folders import require_readable, require_readable_model, require_shared
from pipelines.tables.storage import Folder, JobKind

__all__ = ["prepare"]

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


def prepare(source: str, out: str, config: RunConfig) -> PrepareManifest:
    """Prepare the raw corpus at ``source`` into ``out`` (paths or URIs).

    Raises:
        ConfigError: there is no corpus or no usable row in it, ``out`` holds something else, or a node of the cluster
            does not see a local ``source`` or ``out``.
    """
    began = time.monotonic()
    corpus = sources.find(source)
    target = Folder.at(out)
    if target.uri == corpus.root.uri:
        raise ConfigError(f"--out {out!r} is the corpus itself; choose another folder")
    reader = ImageReader.of(corpus.root, _decoding_limits(config), config.prepare)
    ranges = list(sources.split(corpus, COLUMNS, config.prepare.rows_per_task))
    rows_in = sum(rows.rows for rows in ranges)
    if not rows_in:
        raise ConfigError(f"{source!r} has {len(corpus.names)} files and not one row in them; fill it first")
    session.connect()
    if config.prepare.tokenizer is not None:
        require_readable_model(config.prepare.tokenizer)
        open_tokenizer(config.prepare.tokenizer)
    require_readable(corpus.folder, *corpus.names)
    require_readable(corpus.root, *reader.files)
    target.claim(JobKind.PREPARE)
    require_shared(target)
    for old in (PrepareManifest.FILE, *TABLES, STAGING):  # not before: a refused run changes nothing
        target.remove(old)
    log.info("preparing %d rows of %d files from %s", rows_in, len(corpus.names), corpus.root.uri)
    with ray_tasks.remote_errors():
        ledgers = _stage(target, corpus.root.name, reader, ranges, rows_in, config)
        counts, shrunk_from = _commit(target, ledgers)
    manifest = _manifest(corpus.root.uri, rows_in, counts, shrunk_from, config)
    _check(manifest, target)
    fill_empty_tables(target)
    target.remove(STAGING)
    manifest.write(target)
    for split, rows in manifest.unread_splits.items():
        log.warning(
            "%d rows are of split %r, which no job reads: training reads train…, validation validation…, evaluation "
            "test…; name the split so that it begins with one of them",
            rows,
            split,
        )
    if (line := shrunk_images(manifest)) is not None:
        log.info("%s", line)
    seconds = time.monotonic() - began
    log.info(
        "prepared %d rows in = %d out + %d rejected + %d filtered; %d images; %.1f s, %.0f rows/s",
        manifest.rows_in,
        manifest.rows_out,
        manifest.rejected,
        manifest.filtered,
        manifest.images,
        seconds,
        rows_in / seconds,
    )
    return manifest


def _decoding_limits(config: RunConfig) -> ImageConfig:
    """Images are stored as large as ``encode_max_pixels`` allows, whatever size the model reads."""
    return config.model.image.model_copy(update={"max_pixels": config.prepare.encode_max_pixels})


def _stage(
    target: Folder, source: str, reader: ImageReader, ranges: list[RowRange], rows_in: int, config: RunConfig
) -> list[StagedLedger]:
    """The first pass: ledgers in the order of the corpus."""
    groups = sources.group(ranges, config.prepare.rows_per_task)
    staging = [StagingTask(number, group) for number, group in enumerate(groups)]
    run = partial(stage, out=target, source=source, reader=reader, config=config)
    staged = ray_tasks.task_dataset(staging).map(lambda row: ray_tasks.attempt(run, row[ray_tasks.TASK]))
    ledgers: list[StagedLedger] = []
    done = rejected = 0
    began = logged = time.monotonic()
    for ledger in ray_tasks.results(staged):
        ledgers.append(ledger)
        done += ledger.rows_in
        rejected += ledger.rejected
        now = time.monotonic()
        if now - logged > _LOG_EVERY_S:
            logged = now
            log.info("%d of %d rows, %d rejected, %.0f rows/s", done, rows_in, rejected, done / (now - began))
    if len(ledgers) != len(staging) or done != rows_in:
        raise RuntimeError(f"{done} of {rows_in} rows came back from {len(ledgers)} of {len(staging)} tasks")
    return sorted(ledgers, key=lambda ledger: ledger.task)


def _commit(target: Folder, ledgers: list[StagedLedger]) -> tuple[CommitCounts, NDArray[np.int64]]:
    """The second pass: what the final tables hold, and the ``shrunk_from`` of their images."""
    commits = resolve_duplicates(ledgers)
    run = partial(commit, out=target)
    committed = ray_tasks.task_dataset(commits).map(lambda row: ray_tasks.attempt(run, row[ray_tasks.TASK]))
    counts = list(ray_tasks.results(committed))
    if len(counts) != len(commits):
        raise RuntimeError(f"{len(counts)} of {len(commits)} tasks committed their files")
    shrunk_from = [ledger.shrunk_from[task.keep_images] for ledger, task in zip(ledgers, commits, strict=True)]
    return CommitCounts.total(counts), np.concatenate(shrunk_from)


def _manifest(
    source_uri: str, rows_in: int, counts: CommitCounts, shrunk_from: NDArray[np.int64], config: RunConfig
) -> PrepareManifest:
    return PrepareManifest(
        rows_in=rows_in,
        rows_out=counts.rows_out,
        rejected=counts.rejected,
        images=counts.images,
        images_shrunk=int((shrunk_from > 0).sum()),
        largest_source_pixels=int(shrunk_from.max(initial=0)),
        by_reason=dict(sorted(counts.by_reason.items())),
        by_split_task=dict(sorted(counts.by_split_task.items())),
        source_uri=source_uri,
        created_with={"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("ray", "pyarrow", "pillow")},
        config={"prepare": config.prepare.model_dump(mode="json"), "image": config.model.image.model_dump()},
    )


def _check(manifest: PrepareManifest, target: Folder) -> None:
    accounted = manifest.rows_out + manifest.rejected + manifest.filtered
    if accounted != manifest.rows_in:
        raise RuntimeError(f"{manifest.rows_in} rows went in and {accounted} are accounted for: {manifest}")
    if not manifest.rows_out:
        raise ConfigError(
            f"none of the {manifest.rows_in} rows can be used: {manifest.by_reason}; "
            f"{target.uri}/rejected says why for each"
        )
