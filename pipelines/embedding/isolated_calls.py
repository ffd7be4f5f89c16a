"""A function in a process apart: an argument that ends the process, or never returns, costs that process alone.

The process loads what the function needs once, and serves call after call. When it dies, the argument is tried again in
a new one; what dies ``attempts`` times is an ``ItemError`` that says how. The function sets the deadline of a call
itself (``deadlines``), so the process ends even where nobody waits for it any more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, Self

import ray.cloudpickle as pickle

from crem.errors import ItemError, ResourceError

__all__ = ["KILLED", "TIMED_OUT", "IsolatedCalls"]

KILLED, TIMED_OUT = "killed_its_process", "timed_out"
"""Reasons of items that are given up."""
_READY = "ready"


class IsolatedCalls:
    """Calls of the function that ``make()`` returns in a process apart; a context that ends the process."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], *, timeout_s: float, attempts: int, doing: str):
        """``timeout_s`` is the deadline that the function sets, and ``doing`` names its calls, for messages."""
        self.make, self.timeout_s, self.attempts, self.doing = make, timeout_s, attempts, doing
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __call__(self, argument: Any) -> Any:
        """The value of the function.

        Raises:
            ItemError: the process died of it as often as it may. ResourceError: the process does not start. Exception:
                as the function raised it.
        """
        data, ended = pickle.dumps(argument), 0
        for _ in range(self.attempts):
            pipe = self._pipe or self._start()
            try:
                pipe.send_bytes(data)
                value, error = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                ended = self.end()
                continue
            if error is not None:
                raise error
            return value
        times = f"{self.attempts} times" if self.attempts > 1 else "once"
        if ended == -signal.SIGALRM:
            raise ItemError(TIMED_OUT, f"{self.doing} took longer than {self.timeout_s:g} s, {times}")
        raise ItemError(KILLED, f"{_said(ended)} while {self.doing}, {times}")

    def end(self) -> int:
        """End the process; its exit status."""
        process, self._process = self._process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):  # without its pipe it ends by itself
            return process.wait(timeout=10)
        process.kill()
        return process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
        self.end()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        theirs.close()
        self._pipe = ours
        try:
            ours.send_bytes(pickle.dumps(self.make))
            answer, error = pickle.loads(ours.recv_bytes())
        except (EOFError, OSError) as broken:
            raise ResourceError(
                f"a process apart for {self.doing} does not start: {_said(self.end())}; the worker's log says why"
            ) from broken
        if error is not None:
            self.end()
            raise error
        assert answer == _READY
        return ours


def _said(status: int) -> str:
    with contextlib.suppress(ValueError):
        if status < 0:
            return f"the process ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def _serve(pipe: Connection) -> None:
    """In the process apart: answer calls until the other end is closed."""
    try:
        function = pickle.loads(pipe.recv_bytes())()
    except Exception as error:
        pipe.send_bytes(pickle.dumps((None, error)))
        return
    pipe.send_bytes(pickle.dumps((_READY, None)))
    with contextlib.suppress(EOFError):
        while True:
            argument = pickle.loads(pipe.recv_bytes())
            answer: tuple[Any, Exception | None]
            try:
                answer = (function(argument), None)
            except Exception as error:
                answer = (None, error)
            pipe.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
