"""The training state on disk: weights, optimizer, schedule, step; written by every rank, read by any number of ranks.

Layout. Each rank writes into a folder of its own; put together, the folders of all ranks are one checkpoint:

    state/            DeepSpeed's files      rank-0.json, rank-1.json …   one ``RankManifest`` per rank, written last

A manifest names the step, the number of ranks and its rank's files with their sizes and SHA-256. A checkpoint is
complete when the manifests of all its ranks are there, and good when the files match them: no rename, no coordinator.

Another number of ranks. ZeRO partitions the optimizer over the ranks, so such a checkpoint is first merged by
DeepSpeed's own ``ds_to_universal`` (``convert``, one process per copy of the files) and then read by each rank. Without
ZeRO (stage 0) nothing is partitioned. DeepSpeed 0.19.8 has two faults when it reads a converted checkpoint in stage 3,
which ``load_state`` corrects: every parameter group gets the settings of the first (weight decay would reach gains and
biases), and all groups share one counter of steps (each step would count once per group).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from crem.distributed import rank, world_size
from crem.errors import CheckpointError

__all__ = [
    "FileRecord",
    "RankManifest",
    "convert",
    "files_needed",
    "load_state",
    "manifest_if_complete",
    "read_manifests",
    "save_state",
    "verify",
]

log = logging.getLogger(__name__)

FORMAT = 1
_STATE = "state"
_UNIVERSAL = "universal"
_PARTITION = re.compile(r"(^|_)zero_pp_rank_")
"""In the names of files that hold one rank's partition; DeepSpeed's other files are of use to every rank."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    sha256: str
    """hexadecimal"""


@dataclass(frozen=True)
class RankManifest:
    """What one rank wrote."""

    step: int
    """finished optimizer steps"""
    ranks: int
    rank: int
    zero_stage: int
    run: str
    """identity of the run that wrote it; another run's checkpoint is refused"""
    files: dict[str, FileRecord]
    """by path below the folder"""
    format: int = FORMAT

    @property
    def name(self) -> str:
        """Its file name."""
        return f"rank-{self.rank}.json"

    def to_json(self) -> str:
        """Its file's content."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: bytes | str) -> RankManifest:
        """From the file's content.

        Raises:
            CheckpointError: it is no manifest, or of another format.
        """
        try:
            fields = json.loads(text)
            files = {path: FileRecord(**record) for path, record in fields.pop("files").items()}
            manifest = cls(files=files, **fields)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"the manifest of a checkpoint cannot be read: {error}") from error
        if manifest.format != FORMAT:
            raise CheckpointError(f"a checkpoint of format {manifest.format}; this version of crem reads {FORMAT}")
        return manifest


def save_state(engine: Any, folder: str | Path, *, step: int, run: str = "") -> RankManifest:
    """Write this rank's part of a checkpoint; every rank must call.

    Args:
        folder: empty, and this rank's own.
        step: number of finished optimizer steps.
        run: identity of the run, which ``load_state`` compares.
    """
    folder = Path(folder)
    engine.save_checkpoint(str(folder), tag=_STATE, client_state={"step": step})
    files = {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, _sha256(path))
        for path in sorted((folder / _STATE).rglob("*"))
        if path.is_file()
    }
    manifest = RankManifest(step, world_size(), rank(), int(engine.zero_optimization_stage()), run, files)
    (folder / manifest.name).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def read_manifests(folder: str | Path) -> list[RankManifest]:
    """The manifests in a folder."""
    return [RankManifest.parse(path.read_bytes()) for path in sorted(Path(folder).glob("rank-*.json"))]


def manifest_if_complete(manifests: list[RankManifest]) -> RankManifest | None:
    """The manifest of rank 0 if those of all ranks are there, else ``None``: the checkpoint is not complete."""
    first = next((m for m in manifests if m.rank == 0), None)
    if first is None or {(m.rank, m.step, m.ranks) for m in manifests} != {
        (i, first.step, first.ranks) for i in range(first.ranks)
    }:
        return None
    return first


def files_needed(manifests: list[RankManifest], number: int, ranks: int) -> dict[str, FileRecord]:
    """The files that rank ``number`` of ``ranks`` reads: all of them if they have to be converted first."""
    every = _files_of_all(manifests)
    if not _partitioned_otherwise(manifests, ranks):
        own = next((m.files for m in manifests if m.rank == number), {})
        return {p: record for p, record in every.items() if p in own or not _PARTITION.search(p.rpartition("/")[2])}
    return every


def verify(folder: str | Path, files: Iterable[str] | None = None) -> RankManifest:
    """Check the files (all by default) of a checkpoint against its manifests; returns the manifest of rank 0.

    Raises:
        CheckpointError: it is not complete, or a file is missing, short or changed; the message names it.
    """
    folder = Path(folder)
    manifests = read_manifests(folder)
    first = manifest_if_complete(manifests)
    if first is None:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: it has the manifests of ranks {[m.rank for m in manifests]}"
        )
    written = _files_of_all(manifests)
    for name in written if files is None else files:
        path, record = folder / name, written[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing from the checkpoint")
        if path.stat().st_size != record.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes and was written with {record.bytes}")
        if _sha256(path) != record.sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 has changed since it was written")
    return first


def convert(folder: str | Path, ranks: int) -> None:
    """Make a checkpoint that holds all files of all ranks readable for ``ranks`` ranks, unless it is already.

    One process does it for all that read this folder, before they read. It needs no accelerator and adds about as many
    bytes as the checkpoint has.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder = Path(folder)
    if not _partitioned_otherwise(read_manifests(folder), ranks) or (folder / _UNIVERSAL / "zero").exists():
        return
    options = Namespace(
        input_folder=str(folder / _STATE),
        output_folder=str(folder / _UNIVERSAL),
        num_extract_workers=1,  # in this process: forking under a process group or CUDA is not safe
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # its version, which only models with tensor parallelism write themselves
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        ds_to_universal.main(options)
    log.debug("%s", printed.getvalue())


def load_state(engine: Any, folder: str | Path, *, run: str = "") -> int:
    """Continue from a checkpoint whose ``files_needed`` are in ``folder``; every rank must call. Returns the step.

    Raises:
        CheckpointError: it is incomplete, of another run or ZeRO stage, or not converted for this number of ranks.
    """
    folder = Path(folder)
    manifests = read_manifests(folder)
    first = manifest_if_complete(manifests)
    if first is None:
        raise CheckpointError(f"{folder} is no complete checkpoint")
    if first.run != run:
        raise CheckpointError(f"{folder} is of the run {first.run!r}, not of {run!r}; resume with the settings it had")
    stage = int(engine.zero_optimization_stage())
    if first.zero_stage != stage:
        raise CheckpointError(f"{folder} was written with train.zero_stage={first.zero_stage}, and now it is {stage}")
    universal = _partitioned_otherwise(manifests, world_size())
    if universal and not (folder / _UNIVERSAL / "zero").exists():
        raise CheckpointError(f"{folder} is of {first.ranks} ranks and was not converted for {world_size()}")
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # below ZeRO's
    groups = optimizer.param_groups
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
    before = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = universal  # a setting of the engine in DeepSpeed, not of a load
    try:
        path, client = engine.load_checkpoint(str(folder), tag=_UNIVERSAL if universal else _STATE)
    finally:
        engine._config.load_universal_checkpoint = before
    if path is None or client.get("step") != first.step:
        raise CheckpointError(f"DeepSpeed did not read the checkpoint in {folder}")
    for group, own in zip(groups, settings, strict=True):
        group.update(own)
    for moments in optimizer.state.values():
        if isinstance(moments.get("step"), torch.Tensor):
            moments["step"] = moments["step"].clone()
    return first.step


def _files_of_all(manifests: list[RankManifest]) -> dict[str, FileRecord]:
    return {path: record for manifest in manifests for path, record in manifest.files.items()}


def _partitioned_otherwise(manifests: list[RankManifest], ranks: int) -> bool:
    return bool(manifests) and manifests[0].zero_stage > 0 and manifests[0].ranks != ranks


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
