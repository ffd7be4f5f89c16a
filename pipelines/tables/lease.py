"""One job at a time writes into an output folder: its owner holds a lease, a small file that it renews.

The file is written by compare-and-swap, so of two jobs that start at once exactly one gets it: a conditional PUT on S3
(``If-None-Match``, ``If-Match``), exclusive creation and a lock of the folder on a local disk. Other stores have
neither here; there a job writes, waits and looks whose lease it is.

A lease whose owner is dead is taken over: at once where its process is known to be gone from this machine, else when
its last heartbeat is ``EXPIRY_S`` old and no other comes while the new job watches. An owner that lost its lease (it
was stopped, or cut off from the storage) must not commit: call ``check`` before.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError

from crem.errors import ConfigError, ResourceError
from pipelines.tables.conditional_write import is_s3, put_over
from pipelines.tables.storage import Folder, JobKind
from pipelines.tables.storage_retry import require_storage

__all__ = ["EXPIRY_S", "LEASE", "Lease", "LeaseHolder"]

log = logging.getLogger(__name__)

LEASE = "_lease.json"
"""Name of the lease in an output folder; gone once the job has ended in order."""
EXPIRY_S = 120.0
"""A lease without a heartbeat for so long is taken over. Source: ours; twelve heartbeats."""
HEARTBEAT_S = 10.0
_PATIENCE_S = 5.0
"""How long one reading or writing of a lease is tried again; a heartbeat is repeated anyway."""
_T = TypeVar("_T")


class LeaseHolder(BaseModel):
    """The content of a lease: who holds it."""

    model_config = ConfigDict(frozen=True)

    token: str
    """Names this holder, apart from any other."""
    kind: str
    """Of the job, as in ``_crem.json``."""
    host: str
    pid: int
    process: str
    """Tells the process from a later one of the same pid, and this machine from another of its name."""
    since: float
    heartbeat: float
    """Seconds since the epoch, by the holder's clock."""

    @classmethod
    def here(cls, kind: JobKind) -> LeaseHolder:
        """This process as the holder of a new lease."""
        now = time.time()
        return cls(
            token=uuid.uuid4().hex,
            kind=kind.value,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=_process(os.getpid()),
            since=now,
            heartbeat=now,
        )

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended. Only processes of this machine are known."""
        mine, its = _process(os.getpid()), self.process
        if self.host != socket.gethostname() or not its or mine.split()[:2] != its.split()[:2]:
            return False
        return _process(self.pid) != its

    def describe(self, now: float) -> str:
        """The holder in words."""
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        ago = max(0, round(now - self.heartbeat))
        return f"crem {self.kind} on host {self.host}, process {self.pid}, since {since}, last heartbeat {ago} s ago"


class Lease:
    """The right to write into an output folder; a context that gives it back at its end."""

    def __init__(self, slot: _Slot, holder: LeaseHolder, version: str, heartbeat_s: float):
        self._slot, self._holder, self._version, self._heartbeat_s = slot, holder, version, heartbeat_s
        self._lost_to = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls, folder: Folder, kind: JobKind, *, expiry_s: float = EXPIRY_S, heartbeat_s: float = HEARTBEAT_S
    ) -> Lease:
        """Take the lease of a claimed output folder.

        Raises:
            ConfigError: another job holds it.
        """
        slot, holder = _Slot(folder), LeaseHolder.here(kind)
        for _ in range(8):  # another job may write in between
            found, version = slot.read()
            if found is not None and not found.is_gone:
                _require_dead(slot, found, version, folder, expiry_s, 3 * heartbeat_s)
            if found is not None:
                log.warning("%s: taking over from %s, which has ended", folder.uri, found.describe(time.time()))
            holder = holder.model_copy(update={"heartbeat": time.time()})
            written = slot.write(holder, version)
            if written is not None:
                return cls(slot, holder, written, heartbeat_s)
        raise ConfigError(f"{folder.uri}: other jobs keep taking the lease; run again when they have ended")

    @property
    def token(self) -> str:
        """Names this holder, apart from any other."""
        return self._holder.token

    def check(self) -> None:
        """Raise if the lease was lost.

        Raises:
            ResourceError: another job took it over.
        """
        if self._lost_to:
            raise ResourceError(
                f"{self._slot.folder.uri} was taken over by {self._lost_to}, because this job was silent for too long; "
                "nothing of it was committed; wait for the other, or run again with another --out"
            )

    def confirm(self) -> None:
        """``check`` after a look at the storage: a process that was stopped does not know yet that it lost the lease.

        Raises:
            ResourceError: another job took it over. StorageError: the storage does not answer.
        """
        found, _ = self._slot.read()
        if found is None or found.token != self.token:
            self._lost_to = found.describe(time.time()) if found else "a job that has ended since"
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back. If the storage does not answer, it expires by itself."""
        self._ended.set()
        self._thread.join()
        if not self._lost_to:
            with contextlib.suppress(Exception):
                self._slot.remove(self._holder.token)

    def _renew(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            holder = self._holder.model_copy(update={"heartbeat": time.time()})
            try:
                written = self._slot.write(holder, self._version)
                if written is None:  # another job's, or an earlier write of ours whose answer was lost
                    found, version = self._slot.read()
                    if found is None or found.token != holder.token:
                        self._lost_to = found.describe(time.time()) if found else "a job that has ended since"
                        log.error("the lease of %s is lost to %s", self._slot.folder.uri, self._lost_to)
                        return
                    written = version
                self._version, self._holder = written, holder
            except Exception as error:  # the storage is away: whether the lease is kept shows when it is back
                log.warning("the lease of %s cannot be renewed now: %s", self._slot.folder.uri, error)


def _require_dead(
    slot: _Slot, found: LeaseHolder, version: str, folder: Folder, expiry_s: float, watch_s: float
) -> None:
    """Refuse a job unless the holder has expired and stays silent while it is watched (clocks differ)."""
    now = time.time()
    if now - found.heartbeat > expiry_s:
        log.warning("%s is held by %s; watching for %.0f s", folder.uri, found.describe(now), watch_s)
        time.sleep(watch_s)
        if slot.read()[1] == version:
            return
    raise ConfigError(
        f"{folder.uri} is in use by {found.describe(now)}; wait for it or choose another --out. "
        f"If it is dead, its lease can be taken over {expiry_s:.0f} s after its last heartbeat"
    )


def _process(pid: int) -> str:
    """``<boot> <pid namespace> <start time>`` of a process of this machine; empty where there is none, or no /proc."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        state, started = fields[0], fields[19]
        return "" if state == "Z" else f"{boot} {os.readlink('/proc/self/ns/pid')} {started}"
    except (OSError, IndexError):
        return ""


class _Slot:
    """The file of a lease, which is written only over a known version of it."""

    def __init__(self, folder: Folder):
        self.folder = folder.patient(0)
        self._path = folder.path(LEASE)

    def read(self) -> tuple[LeaseHolder | None, str]:
        """The holder and the version of its lease; ``(None, "")`` where there is none."""
        return self._call("reading", self._read)

    def write(self, holder: LeaseHolder, version: str) -> str | None:
        """Write over ``version``; the new version, or ``None`` where the lease has another version by now."""
        return self._call("writing", lambda: self._write(holder.model_dump_json().encode(), version))

    def remove(self, token: str) -> None:
        """Remove the lease if ``token`` holds it."""
        with self._locked():
            found, _ = self._read()
            if found is not None and found.token == token:
                self.folder.fs.rm_file(self._path)

    def _call(self, doing: str, call: Callable[[], _T]) -> _T:
        return require_storage(f"{doing} {self.folder.uri}/{LEASE}", call, timeout_s=_PATIENCE_S)

    def _read(self) -> tuple[LeaseHolder | None, str]:
        fs = self.folder.fs
        try:
            data = fs.cat_file(self._path)
            version = data.decode(errors="replace")
            if is_s3(fs):  # the entity tag belongs to the content if the content is the same after it
                version = fs.info(self._path)["ETag"]
                if fs.cat_file(self._path) != data:
                    return self._read()
        except FileNotFoundError:
            return None, ""
        try:
            return LeaseHolder.model_validate_json(data), version
        except ValidationError as error:
            raise ConfigError(f"{self.folder.uri}/{LEASE} is damaged; remove it if no job writes there") from error

    def _write(self, data: bytes, version: str) -> str | None:
        fs = self.folder.fs
        if is_s3(fs):
            return put_over(fs, self._path, data, version)
        with self._locked():
            found, current = self._read()
            if current != version:
                return None
            if found is None and isinstance(fs, LocalFileSystem):
                with contextlib.suppress(FileExistsError), open(self._path, "xb") as file:
                    file.write(data)
                    return data.decode()
                return None
            self.folder.write_bytes(data, LEASE)
        if not isinstance(fs, LocalFileSystem):
            time.sleep(2.0)  # two jobs that wrote at once: the later one has it
            return data.decode() if self._read()[1] == data.decode() else None
        return data.decode()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes of this machine (of all machines, on most network file systems) from the file."""
        if not isinstance(self.folder.fs, LocalFileSystem):
            yield
            return
        handle = os.open(self.folder.path(), os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: exclusive creation must do
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
