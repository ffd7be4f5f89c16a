"""The checkpoints of a run in storage: complete or absent, and checked before they are used.

``ray.train.report(checkpoint=…)`` is not used. Its controller writes an index beside the checkpoints: not atomically,
so that a kill leaves an index which no later run can read; and any failure of the storage during that write, or during
an asynchronous upload, ends the controller or the workers. Here there is no index. Each rank uploads its own files and
then its manifest (``crem.train.state``); a checkpoint is complete when the manifests of all its ranks are there. Its
folder is named by step and by attempt (one start of the workers), so parts of two attempts never mix:

    checkpoints/step-00000500-1f0c9a2e/state/…  rank-0.json  rank-1.json      (damaged.json: never read again)

Ranks need not agree on any of this: a checkpoint that one of them gave up lacks a manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from crem.errors import CheckpointError
from crem.train.state import RankManifest, manifest_if_complete, read_manifests
from pipelines.tables.storage import Folder

__all__ = ["CHECKPOINTS", "Checkpoints", "StoredCheckpoint"]

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Their folder in that of a run."""
_DAMAGED = "damaged.json"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint in storage; its files are not checked yet."""

    name: str
    step: int
    manifests: list[RankManifest]


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run, in a folder that holds nothing else."""

    folder: Folder

    def complete(self) -> list[StoredCheckpoint]:
        """Complete checkpoints that are not known to be damaged, the newest first."""
        found = []
        for name in self.folder.folders():
            if self.folder.exists(name, _DAMAGED):
                continue
            try:
                manifests = self.manifests(name)
            except CheckpointError as error:
                log.warning("%s/%s is skipped: %s", self.folder.uri, name, error)
                continue
            if first := manifest_if_complete(manifests):
                found.append(StoredCheckpoint(name, first.step, manifests))
        return sorted(found, key=lambda c: (c.step, c.name), reverse=True)

    def manifests(self, name: str) -> list[RankManifest]:
        """The manifests of a checkpoint, complete or not."""
        files = [file for file in self.folder.child(name).files(".json") if file.startswith("rank-")]
        manifests = []
        for file in files:
            with self.folder.open(name, file) as source:
                manifests.append(RankManifest.parse(source.read()))
        return manifests

    def write(self, name: str, local: Path) -> None:
        """Upload one rank's part; its manifest goes last."""
        manifests = {manifest.name for manifest in read_manifests(local)}
        files = [path.relative_to(local).as_posix() for path in sorted(local.rglob("*")) if path.is_file()]
        for file in sorted(files, key=lambda f: f in manifests):
            self.folder.upload(str(local / file), name, file)

    def fetch(self, checkpoint: StoredCheckpoint, files: Collection[str], local: Path) -> None:
        """Download the named files and all manifests."""
        for file in [*files, *(manifest.name for manifest in checkpoint.manifests)]:
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            self.folder.download(str(local / file), checkpoint.name, file)

    def mark_damaged(self, name: str, reason: str) -> None:
        """Skip a checkpoint from now on."""
        self.folder.write_json({"reason": reason}, name, _DAMAGED)

    def tidy(self, *, keep: int, attempt: str, pinned: Collection[str] = ()) -> None:
        """Remove all but the ``keep`` newest complete checkpoints, and parts that will never be completed.

        Args:
            attempt: the parts of this one are still being written.
            pinned: names that are never removed.
        """
        complete = self.complete()
        if not complete:
            return
        kept = {c.name for c in complete[:keep]} | set(pinned)
        known = {c.name for c in complete}
        for name in self.folder.folders():
            in_progress = name.endswith(f"-{attempt}") and name not in known and name > complete[0].name
            if name in kept or in_progress:
                continue
            self.folder.remove(name, "rank-0.json")  # first: what an interrupted removal leaves is incomplete
            self.folder.remove(name)
