"""Runs as child processes, some at a time: what a run leaks or breaks is gone with its process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Lock

from crem.errors import CremError, TrainingError
from pipelines.ablation.runs import AblationInputs, Run
from pipelines.tables.storage import Folder

__all__ = ["execute_all"]

log = logging.getLogger(__name__)

_TRIES = 3
"""Of a run that fails. Source: measured: on an overloaded machine Ray gives up its own start after 30 s."""
_GRACE_S = 20.0
"""For a run to shut its Ray down when the ablation ends."""


def execute_all(
    runs: Sequence[Run], target: Folder, inputs: AblationInputs, parallel: int, report: Callable[[], object]
) -> dict[str, Exception]:
    """Execute the runs, ``parallel`` at a time, and report after each; a failed one is tried again at the end.

    Returns:
        The last error of each run that failed every time, by name.

    Raises:
        CremError: an error that every other run would meet as well.
    """
    waiting, failures = list(runs), dict[str, Exception]()
    tries = dict.fromkeys((run.name for run in runs), 0)
    running: dict[object, _Child] = {}
    began = time.monotonic()
    start_lock = multiprocessing.get_context("spawn").Lock()
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                child = _Child(waiting.pop(0), target, inputs, start_lock)
                running[child.connection] = child
            for ready in wait([child.connection for child in running.values()]):
                child = running.pop(ready)
                name = child.run.name
                error = child.error()
                if isinstance(error, CremError) and not isinstance(error, TrainingError):
                    raise error
                failures.pop(name, None)
                if error is not None:
                    log.error("%s failed: %s", name, error)
                    failures[name] = error
                    tries[name] += 1
                    if tries[name] < _TRIES:  # from its newest checkpoint
                        waiting.append(child.run)
                done = len(runs) - len(waiting) - len(running)
                left_s = (time.monotonic() - began) / max(1, done) * (len(runs) - done)
                log.info("%d of %d runs ended, %s; about %.0f min left", done, len(runs), name, left_s / 60)
                try:
                    report()
                except Exception:  # hours of training do not end because a report could not be drawn
                    log.warning("the report could not be written", exc_info=True)
    finally:
        for child in running.values():
            child.process.terminate()
        for child in running.values():
            child.stop()
    return failures


class _Child:
    """The process of one run."""

    def __init__(self, run: Run, target: Folder, inputs: AblationInputs, start_lock: Lock):
        context = multiprocessing.get_context("spawn")
        self.run = run
        self.connection, sender = context.Pipe(duplex=False)
        level = logging.getLogger("pipelines").getEffectiveLevel()
        self.process: BaseProcess = context.Process(
            target=_child_main, args=(sender, run, target, inputs, start_lock, level), name=f"crem-{run.name}"
        )
        self.process.start()
        sender.close()

    def error(self) -> Exception | None:
        """The error that the process sent, None for success; call when the connection is ready."""
        try:
            error: Exception | None = self.connection.recv()
        except EOFError:
            self.process.join()
            return TrainingError(f"its process ended with code {self.process.exitcode} and sent no result")
        self.stop()
        return error

    def stop(self) -> None:
        """Wait a moment for the process to end, then kill it."""
        self.process.join(_GRACE_S)
        self.process.kill()


def _child_main(
    sender: Connection, run: Run, target: Folder, inputs: AblationInputs, start_lock: Lock, level: int
) -> None:
    """Execute one run, and send the error or None to the parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {run.name}: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pipelines").setLevel(level)
    if level > logging.DEBUG:
        warnings.filterwarnings("ignore")
    for noisy in ("ray", "deepspeed", "DeepSpeed", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        run.execute(target, inputs, start_lock)
        sender.send(None)
    except CremError as error:
        sender.send(error)
    except Exception as error:
        log.exception("%s failed", run.name)
        sender.send(TrainingError(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """End this process with its parent: a run whose ablation was killed must not compete with its own next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # Ray's handler, where there is one, shuts its processes down
    time.sleep(_GRACE_S)
    os._exit(1)
