"""The checkpoints of a run in storage: written in the background, complete or absent, checked before they are used.

``ray.train.report(checkpoint=…)`` is not used. Its controller writes an index beside the checkpoints: not atomically,
so that a kill leaves an index which no later run can read; and any failure of the storage during that write, or during
an asynchronous upload, ends the controller or the workers. Here there is no index. Each rank uploads its own files and
then its mark (``crem.train.state``); a checkpoint is complete when the marks of all of its ranks are there. Folders are
named by step and by attempt (one start of the workers), so parts of two attempts never meet:

    checkpoints/step-00000500-1f0c9a2e/state/…  rank-0.json  rank-1.json      (damaged.json: never read again)

A failed upload is tried again, with longer and longer pauses, until the next checkpoint is due, which replaces it. One
upload is in flight at a time, so a worker's disk holds one copy of its part. Ranks need not agree on any of this: a
checkpoint that one of them gave up lacks a mark.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from crem.errors import CheckpointError, CremError
from crem.train.state import Mark, common_mark, convert, files_needed, read_marks, verify
from pipelines.tables.storage import Folder

__all__ = ["CHECKPOINTS", "Checkpoints", "Found", "Uploads", "fetch_newest", "leads", "patiently", "scratch"]

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Their folder in that of a run."""
_DAMAGED = "damaged.json"
_PATIENCE_S = 600.0
"""How long a start or an end waits for storage that does not answer. Source: ours."""
_LONGEST_PAUSE_S = 30.0
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A complete checkpoint in storage; its files are not checked yet."""

    name: str
    step: int
    marks: list[Mark]


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run, in a folder that holds nothing else."""

    folder: Folder

    def complete(self) -> list[Found]:
        """Complete checkpoints that are not known to be damaged, the newest first."""
        found = []
        for name in self.folder.folders():
            if self.folder.exists(name, _DAMAGED):
                continue
            try:
                marks = self.marks(name)
            except CheckpointError as error:
                log.warning("%s/%s is passed over: %s", self.folder.uri, name, error)
                continue
            if first := common_mark(marks):
                found.append(Found(name, first.step, marks))
        return sorted(found, key=lambda f: (f.step, f.name), reverse=True)

    def marks(self, name: str) -> list[Mark]:
        """The marks of a checkpoint, complete or not."""
        marks = []
        for file in self.folder.child(name).files(".json"):
            if file.startswith("rank-"):
                with self.folder.open(name, file) as source:
                    marks.append(Mark.parse(source.read()))
        return marks

    def write(self, name: str, local: Path) -> None:
        """Upload one rank's part; its mark goes last."""
        marks = {mark.name for mark in read_marks(local)}
        files = [path.relative_to(local).as_posix() for path in sorted(local.rglob("*")) if path.is_file()]
        for file in sorted(files, key=lambda f: f in marks):
            self.folder.upload(str(local / file), name, file)

    def fetch(self, found: Found, files: Collection[str], local: Path) -> None:
        """Download the named files and all marks."""
        for file in [*files, *(mark.name for mark in found.marks)]:
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            self.folder.download(str(local / file), found.name, file)

    def condemn(self, name: str, reason: str) -> None:
        """Have a checkpoint passed over from now on."""
        self.folder.write_json({"reason": reason}, name, _DAMAGED)

    def tidy(self, *, keep: int, attempt: str, pinned: Collection[str] = ()) -> None:
        """Remove all but the ``keep`` newest complete checkpoints, and parts that nobody will complete.

        Args:
            attempt: the parts of this one are still being written.
            pinned: names that stay in any case.
        """
        complete = self.complete()
        if not complete:
            return
        stay = {f.name for f in complete[:keep]} | set(pinned)
        known = {f.name for f in complete}
        for name in self.folder.folders():
            ours = name.endswith(f"-{attempt}") and name not in known
            if name in stay or (ours and name > complete[0].name):
                continue
            self.folder.remove(
                name, "rank-0.json"
            )  # first, so that what is left when this is interrupted is incomplete
            self.folder.remove(name)


def patiently(what: str, call: Callable[[], T], *, patience_s: float = _PATIENCE_S) -> T:
    """What ``call`` returns; while storage fails it is called again, for ``patience_s`` at the longest.

    A file that is not there, and an error that is meant for the user, are raised at once.
    """
    deadline, pause_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return call()
        except (CremError, FileNotFoundError, TypeError, ValueError, AssertionError):
            raise
        except Exception as error:  # botocore's, aiohttp's and the operating system's have nothing in common
            if time.monotonic() + pause_s > deadline:
                raise
            log.warning("%s: storage failed (%s); trying again in %.0f s", what, error, pause_s)
            time.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)


class Uploads:
    """One rank's uploads, in a thread, one at a time."""

    def __init__(
        self, checkpoints: Checkpoints, *, rank: int, attempt: str, keep: int, tell: Callable[[str], None] = log.warning
    ):
        self._checkpoints, self._rank, self._attempt, self._keep, self._tell = checkpoints, rank, attempt, keep, tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: Future[None] | None = None
        self._hurry = threading.Event()

    def start(self, local: Path, step: int) -> None:
        """Upload a rank's part, which is then removed. Call ``make_room`` before it is written."""
        assert self._flight is None, "one upload at a time"
        self._flight = self._thread.submit(self._upload, local, f"step-{step:08d}-{self._attempt}", step)

    def make_room(self) -> None:
        """Wait for the upload in flight. One that is failing is given up, because a newer checkpoint is due."""
        self._settle(None)

    def finish(self, patience_s: float = _PATIENCE_S) -> None:
        """Wait for the last upload, and let it be tried again for so long."""
        self._settle(patience_s)
        self._thread.shutdown()

    def _settle(self, patience_s: float | None) -> None:
        if self._flight is None:
            return
        begun = time.monotonic()
        if patience_s is not None:
            with_time = threading.Timer(patience_s, self._hurry.set)
            with_time.daemon = True
            with_time.start()
            self._flight.result()
            with_time.cancel()
        else:
            self._hurry.set()
            self._flight.result()
            if (waited_s := time.monotonic() - begun) > 10:
                log.warning("training waited %.0f s for the checkpoint before; raise train.checkpoint_every", waited_s)
        self._hurry.clear()
        self._flight = None

    def _upload(self, local: Path, name: str, step: int) -> None:
        pause_s, failures = 1.0, 0
        try:
            while True:
                try:
                    self._checkpoints.write(name, local)
                    break
                except Exception as error:  # storage fails in many ways, and none of them may end the run
                    failures += 1
                    log.warning("attempt %d to write the checkpoint of step %d: %s", failures, step, error)
                    if failures == 1:
                        self._tell(
                            f"the checkpoint of step {step} is not written: {self._checkpoints.folder.uri} failed rank "
                            f"{self._rank} ({error}); trying again until the next one is due. Training goes on"
                        )
                if self._hurry.wait(pause_s):
                    self._tell(
                        f"there is NO checkpoint of step {step}: rank {self._rank} gave it up after {failures} attempts"
                    )
                    return
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
            if failures:
                self._tell(f"rank {self._rank} wrote its part of the checkpoint of step {step} after all")
            if self._rank == 0:
                self.tidy()
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def tidy(self) -> None:
        """Remove old checkpoints and abandoned parts; what fails is left to the next call."""
        try:
            self._checkpoints.tidy(keep=self._keep, attempt=self._attempt)
        except Exception as error:
            log.warning("old checkpoints could not be removed: %s", error)


def scratch(run: str, node: str, attempt: str) -> Path:
    """This node's folder on local disk for one start of the workers; what earlier, killed ones left is removed.

    Args:
        run: names the run and its output, which no two processes write at a time.
    """
    key = hashlib.sha256(run.encode()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"crem-train-{os.getuid()}-{key}" / node[:16]
    root.mkdir(parents=True, exist_ok=True)
    for left in root.iterdir():
        if left.name != attempt:
            shutil.rmtree(left, ignore_errors=True)
    (root / attempt).mkdir(exist_ok=True)
    return root / attempt


def leads(place: Path) -> bool:
    """Whether this process is the first of its node to ask in ``place``. (Ray's local ranks count by address, and two
    nodes may have one.)"""
    try:
        (place / "leader").mkdir()
    except FileExistsError:
        return False
    return True


def fetch_newest(
    checkpoints: Checkpoints,
    place: Path,
    *,
    rank: int,
    ranks: int,
    leader: bool,
    from_rank_zero: Callable[[str], str],
    anywhere: Callable[[bool], bool],
    tell: Callable[[str], None] = log.warning,
) -> tuple[Path, int] | None:
    """The newest good checkpoint, downloaded, checked and readable for ``ranks`` ranks; every rank must call.

    All ranks use the same one: rank 0 names it, and one rank's objection is enough to go on to the one before.

    Args:
        place: local folder, the same for all ranks of a node.
        leader: one rank of each node, which converts a checkpoint of another number of ranks for all of them.
        from_rank_zero: what rank 0 gave, on every rank.
        anywhere: whether any rank gave true, on every rank.
        tell: takes warnings; called on the rank that found the damage.

    Returns:
        Folder and step, or ``None`` where there is no checkpoint or none is good.
    """
    candidates = patiently("looking for checkpoints", checkpoints.complete) if rank == 0 else []
    begun = bool(candidates)
    while name := from_rank_zero(candidates.pop(0).name if candidates else ""):
        ready, problem = None, ""
        try:
            ready = _fetched(checkpoints, name, place, rank=rank, ranks=ranks, leader=leader)
        except (CheckpointError, FileNotFoundError) as error:
            problem = str(error)
            tell(f"the checkpoint {checkpoints.folder.uri}/{name} is damaged and not used: {problem}")
        if not anywhere(bool(problem)):
            return ready
        for left in (place / f"resume-{rank}", *([place / "resume"] if leader else [])):
            shutil.rmtree(left, ignore_errors=True)
        if rank == 0:
            checkpoints.condemn(name, problem or "damage that another rank found")
    if begun:
        tell("no checkpoint of the run is good; it starts again from step 0")
    return None


def _fetched(
    checkpoints: Checkpoints, name: str, place: Path, *, rank: int, ranks: int, leader: bool
) -> tuple[Path, int]:
    """What this rank reads of a checkpoint, in a folder of its own, or of its node where it has to be converted."""
    marks = patiently(name, lambda: checkpoints.marks(name))
    first = common_mark(marks)
    if first is None:
        raise CheckpointError(f"{name} has lost a mark")
    shared = first.zero_stage > 0 and first.ranks != ranks
    folder = place / ("resume" if shared else f"resume-{rank}")
    if leader or not shared:
        files = files_needed(marks, rank, ranks)
        patiently(name, lambda: checkpoints.fetch(Found(name, first.step, marks), files, folder))
        verify(folder, files)
        convert(folder, ranks)
    return folder, first.step
