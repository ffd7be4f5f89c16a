"""What ends a process, or never ends, costs a process apart alone; attempts are counted over processes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crem.errors import ItemError, ResourceError
from pipelines.embedding.attempts import _MOST, Attempts
from pipelines.embedding.deadlines import arm, deadline, disarm
from pipelines.embedding.isolated_calls import IsolatedCalls
from pipelines.tables.storage import Folder

TIMEOUT_S = 1.0


def doubling(folder: Path) -> Callable[[object], object]:
    """Doubles, but for what is said here; notes each start of a process."""

    def double(value: object) -> object:
        with deadline(TIMEOUT_S):
            if value == "segfault":
                ctypes.string_at(0)
            if value == "endless":  # holds the interpreter, as native code does
                ctypes.PyDLL(None).sleep(1 << 30)
            if value == "killed once" and len(os.listdir(folder)) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if value == "raises":
                raise KeyError(value)
            return [value, value]

    (folder / str(os.getpid())).touch()
    return double


def test_an_argument_that_ends_its_process_is_an_error_and_the_others_have_values(tmp_path: Path) -> None:
    calls = IsolatedCalls(lambda: doubling(tmp_path), timeout_s=TIMEOUT_S, attempts=2, doing="doubling")
    with calls:
        assert calls(1) == [1, 1]
        assert calls("killed once") == ["killed once", "killed once"]
        assert len(list(tmp_path.iterdir())) == 2
        with pytest.raises(ItemError, match="^killed_its_process: the process ended by SIGSEGV while doubling, 2 time"):
            calls("segfault")
        with pytest.raises(KeyError):
            calls("raises")
        assert calls(2) == [2, 2]
        with pytest.raises(ItemError, match=r"^timed_out: doubling took longer than 1 s, 2 times"):
            calls("endless")
        assert calls(3) == [3, 3]
        assert len(list(tmp_path.iterdir())) == 6
        process = calls._process
    assert process is not None and process.returncode is not None


def test_a_process_apart_that_does_not_start_is_said() -> None:
    with (
        IsolatedCalls(lambda: os._exit(3), timeout_s=1, attempts=2, doing="doubling") as calls,
        pytest.raises(ResourceError, match="for doubling does not start: the process ended with status 3"),
    ):
        calls(1)


def test_a_deadline_ends_the_process_unless_each_thread_is_done_in_time() -> None:
    program = """if 1:
        import threading, time
        from pipelines.embedding.deadlines import arm, deadline, disarm
        with deadline(1): pass
        arm(1); arm(60); disarm()
        time.sleep(1.5)
        threading.Thread(target=lambda: (arm(0.5), time.sleep(60)), daemon=True).start()
        with deadline(30): pass
        print("well", flush=True)
        time.sleep(30)"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, "well\n")
    assert "in <lambda>" in done.stderr and time.monotonic() - began < 29


def test_attempts_are_counted_over_processes_and_bounded_in_a_run(tmp_path: Path) -> None:
    arm(60)
    disarm()
    work = Folder.at(tmp_path)
    first, second = (Attempts(work, run, 2, 3) for run in ("a", "b"))
    assert [first.begin(4), first.begin(4), second.begin(4), first.begin(5), first.begin(4, 0)] == [1, 2, 3, 1, 1]
    assert [second.is_careful(n) for n in (1, 2, 3)] == [False, False, True]
    assert sorted(path.name for path in (tmp_path / "attempts" / "000001").iterdir()) == [
        "00000004-0000.1.json", "00000004.1.json", "00000004.2.json", "00000004.3.json", "00000005.1.json",
    ]  # fmt: skip
    for _ in range(_MOST - 1):
        second.begin(4)
    with pytest.raises(ResourceError, match=rf"piece 00000004 ended {_MOST} times in this run.*embed\.batch_tokens"):
        second.begin(4)
    assert first.begin(4) == _MOST + 4, "those of another run are not counted"
