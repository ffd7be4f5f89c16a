"""A start of the workers finds the newest good checkpoint, on which all ranks agree."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crem.errors import CheckpointError
from crem.train.state import convert, files_needed, manifest_if_complete, verify
from pipelines.tables.storage_retry import retry_storage
from pipelines.training.checkpoints import Checkpoints, StoredCheckpoint

__all__ = ["LocalCheckpoint", "RankPlace", "fetch_newest"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankPlace:
    """A rank among the others of its start."""

    rank: int
    ranks: int
    is_node_leader: bool
    """one rank of each node, which converts a checkpoint of another number of ranks for all of them"""
    workspace: Path
    """local folder, the same for all ranks of a node"""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A good checkpoint on local disk, readable for this number of ranks."""

    folder: Path
    step: int


def fetch_newest(
    checkpoints: Checkpoints,
    place: RankPlace,
    *,
    from_rank_zero: Callable[[str], str],
    any_rank: Callable[[bool], bool],
    warn: Callable[[str], None] = log.warning,
) -> LocalCheckpoint | None:
    """Download, check and, if need be, convert the newest good checkpoint; every rank must call.

    All ranks use the same one: rank 0 names it, and if any rank finds it damaged, all try the one before.

    Args:
        from_rank_zero: returns rank 0's argument on every rank.
        any_rank: returns on every rank whether any rank's argument is true.
        warn: takes warnings; called on the rank that found the damage.

    Returns:
        ``None`` if there is no checkpoint or none is good.
    """
    candidates = retry_storage("looking for checkpoints", checkpoints.complete) if place.rank == 0 else []
    had_candidates = bool(candidates)
    while name := from_rank_zero(candidates.pop(0).name if candidates else ""):
        fetched, problem = None, ""
        try:
            fetched = _fetch(checkpoints, name, place)
        except (CheckpointError, FileNotFoundError) as error:
            problem = str(error)
            warn(f"the checkpoint {checkpoints.folder.uri}/{name} is damaged and not used: {problem}")
        if not any_rank(bool(problem)):
            return fetched
        shutil.rmtree(_own_folder(place), ignore_errors=True)
        if place.is_node_leader:
            shutil.rmtree(_shared_folder(place), ignore_errors=True)
        if place.rank == 0:
            checkpoints.mark_damaged(name, problem or "damage that another rank found")
    if had_candidates:
        warn("no checkpoint of the run is good; it starts again from step 0")
    return None


def _fetch(checkpoints: Checkpoints, name: str, place: RankPlace) -> LocalCheckpoint:
    """What this rank reads of a checkpoint: in its own folder, or in its node's if it has to be converted."""
    manifests = retry_storage(name, lambda: checkpoints.manifests(name))
    first = manifest_if_complete(manifests)
    if first is None:
        raise CheckpointError(f"{name} has lost a manifest")
    shared = first.zero_stage > 0 and first.ranks != place.ranks
    folder = _shared_folder(place) if shared else _own_folder(place)
    if place.is_node_leader or not shared:
        files = files_needed(manifests, place.rank, place.ranks)
        stored = StoredCheckpoint(name, first.step, manifests)
        retry_storage(name, lambda: checkpoints.fetch(stored, files, folder))
        verify(folder, files)
        convert(folder, place.ranks)
    return LocalCheckpoint(folder, first.step)


def _own_folder(place: RankPlace) -> Path:
    return place.workspace / f"resume-{place.rank}"


def _shared_folder(place: RankPlace) -> Path:
    return place.workspace / "resume"
