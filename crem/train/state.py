"""The state of a run on disk: weights, optimizer, schedule, step; written by every rank, read by any number of ranks.

Layout. Each rank writes into a folder of its own; put together, the folders of all ranks are one checkpoint:

    state/            DeepSpeed's files             rank-0.json, rank-1.json …   one *mark* per rank, written last

A mark names the step, the number of ranks and its rank's files with their sizes and SHA-256. A checkpoint is complete
when the marks of all its ranks are there, and good when the files are what the marks say: no rename, no coordinator.

Another number of ranks. ZeRO partitions the optimizer over the ranks, so such a checkpoint is first made whole with
DeepSpeed's own ``ds_to_universal`` (``convert``, one process per copy of the files) and then read by each rank. Without
ZeRO (stage 0) nothing is partitioned. DeepSpeed 0.19.8 does two things wrong when it reads a converted checkpoint in
stage 3, which are set right here: every parameter group gets the settings of the first (weight decay would reach gains
and biases), and all groups share one counter of steps (each step would count once per group).
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

__all__ = ["Mark", "common_mark", "convert", "files_needed", "load_state", "read_marks", "save_state", "verify"]

log = logging.getLogger(__name__)

FORMAT = 1
_STATE = "state"
_UNIVERSAL = "universal"
_PARTITION = re.compile(r"(^|_)zero_pp_rank_")
"""In the names of files that hold one rank's partition; DeepSpeed's other files are of use to every rank."""


@dataclass(frozen=True)
class Mark:
    """What one rank wrote."""

    step: int
    """finished optimizer steps"""
    ranks: int
    rank: int
    zero_stage: int
    run: str
    """of the run that wrote it; a checkpoint of another is refused"""
    files: dict[str, dict[str, Any]]
    """by path below the folder: ``bytes`` and ``sha256``"""
    format: int = FORMAT

    @property
    def name(self) -> str:
        """The file of this mark."""
        return f"rank-{self.rank}.json"

    @classmethod
    def parse(cls, text: bytes | str) -> Mark:
        """From the file's content.

        Raises:
            CheckpointError: it is not a mark.
        """
        try:
            mark = cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"a checkpoint's mark cannot be read: {error}") from error
        if mark.format != FORMAT:
            raise CheckpointError(f"a checkpoint of format {mark.format}; this version of crem reads {FORMAT}")
        return mark


def save_state(engine: Any, folder: str | Path, *, step: int, run: str = "") -> Mark:
    """Write this rank's part of a checkpoint; every rank must call.

    Args:
        folder: empty, and this rank's own.
        step: number of finished optimizer steps.
        run: what ``load_state`` will ask for.
    """
    folder = Path(folder)
    engine.save_checkpoint(str(folder), tag=_STATE, client_state={"step": step})
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted((folder / _STATE).rglob("*"))
        if path.is_file()
    }
    mark = Mark(step, world_size(), rank(), int(engine.zero_optimization_stage()), run, files)
    (folder / mark.name).write_text(json.dumps(asdict(mark)), encoding="utf-8")
    return mark


def read_marks(folder: str | Path) -> list[Mark]:
    """The marks in a folder."""
    return [Mark.parse(path.read_bytes()) for path in sorted(Path(folder).glob("rank-*.json"))]


def common_mark(marks: list[Mark]) -> Mark | None:
    """The mark of rank 0 where the marks of all ranks are there, else ``None``: the checkpoint is not complete."""
    first = next((mark for mark in marks if mark.rank == 0), None)
    if first is None or {(m.rank, m.step, m.ranks) for m in marks} != {
        (i, first.step, first.ranks) for i in range(first.ranks)
    }:
        return None
    return first


def files_needed(marks: list[Mark], number: int, ranks: int) -> dict[str, dict[str, Any]]:
    """The files that rank ``number`` of ``ranks`` reads: all of them where they have to be converted first."""
    every = {path: facts for mark in marks for path, facts in mark.files.items()}
    if not _partitioned_otherwise(marks, ranks):
        own = next((mark.files for mark in marks if mark.rank == number), {})
        return {p: facts for p, facts in every.items() if p in own or not _PARTITION.search(p.rpartition("/")[2])}
    return every


def verify(folder: str | Path, files: Iterable[str] | None = None) -> Mark:
    """Check the files (all by default) of a complete checkpoint against its marks; returns the mark of rank 0.

    Raises:
        CheckpointError: it is not complete, or a file is missing, short or of other content; the message names it.
    """
    folder = Path(folder)
    marks = read_marks(folder)
    first = common_mark(marks)
    if first is None:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: it has the marks of ranks {[m.rank for m in marks]}"
        )
    wanted = {path: facts for mark in marks for path, facts in mark.files.items()}
    for name in wanted if files is None else files:
        path, facts = folder / name, wanted[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing from the checkpoint")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes and was written with {facts['bytes']}")
        if _sha256(path) != facts["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of what was written")
    return first


def convert(folder: str | Path, ranks: int) -> None:
    """Make a checkpoint that holds all files of all ranks readable for ``ranks`` ranks, where it is not yet.

    One process does it for all that read this folder, and before they read. It needs no accelerator and adds about as
    many bytes as the checkpoint has.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder = Path(folder)
    if not _partitioned_otherwise(read_marks(folder), ranks) or (folder / _UNIVERSAL / "zero").exists():
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
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ds_to_universal.main(options)
    log.debug("%s", said.getvalue())


def load_state(engine: Any, folder: str | Path, *, run: str = "") -> int:
    """Continue from a checkpoint whose ``files_needed`` are in ``folder``; every rank must call. Returns the step.

    Raises:
        CheckpointError: it is incomplete, of another run or ZeRO stage, or not converted for this number of ranks.
    """
    folder = Path(folder)
    marks = read_marks(folder)
    first = common_mark(marks)
    if first is None:
        raise CheckpointError(f"{folder} is no complete checkpoint")
    if first.run != run:
        raise CheckpointError(f"{folder} is of the run {first.run!r}, not of {run!r}; resume with the settings it had")
    stage = int(engine.zero_optimization_stage())
    if first.zero_stage != stage:
        raise CheckpointError(f"{folder} was written with train.zero_stage={first.zero_stage}, and now it is {stage}")
    universal = _partitioned_otherwise(marks, world_size())
    if universal and not (folder / _UNIVERSAL / "zero").exists():
        raise CheckpointError(f"{folder} is of {first.ranks} ranks and was not converted for {world_size()}")
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # below ZeRO's
    groups = optimizer.param_groups
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
    before = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = universal  # DeepSpeed knows it as an engine's setting, not as a load's
    try:
        path, client = engine.load_checkpoint(str(folder), tag=_UNIVERSAL if universal else _STATE)
    finally:
        engine._config.load_universal_checkpoint = before
    if path is None or client.get("step") != first.step:
        raise CheckpointError(f"DeepSpeed did not read the checkpoint in {folder}")
    for group, held in zip(groups, settings, strict=True):
        group.update(held)
    for moments in optimizer.state.values():
        if isinstance(moments.get("step"), torch.Tensor):
            moments["step"] = moments["step"].clone()
    return first.step


def _partitioned_otherwise(marks: list[Mark], ranks: int) -> bool:
    return bool(marks) and marks[0].zero_stage > 0 and marks[0].ranks != ranks


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
