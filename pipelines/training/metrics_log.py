"""Metrics of a training run: ``metrics.jsonl`` and TensorBoard event files in its output folder, always, and a tracker
if one is set (``pipelines.training.trackers``).

Training terms have plain names, those of held-out rows begin with ``validation/``. If the run is on an object store,
the JSON lines are written there after every entry; the event files stay on the driver's disk and are copied at the end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from typing import TYPE_CHECKING

from crem.train.progress import Progress
from pipelines.tables.storage import Folder
from pipelines.training.trackers import Tracker

__all__ = ["MetricsLog", "read_metrics"]

if TYPE_CHECKING:  # it draws charts
    from pipelines.reports.training_page import MetricEntry

log = logging.getLogger(__name__)

_FILE = "metrics.jsonl"


def read_metrics(run: Folder) -> list[MetricEntry]:
    """Entries of a run, by step."""
    if not run.exists(_FILE):
        return []
    with run.open(_FILE) as file:
        return [json.loads(line) for line in file.read().decode().splitlines() if line.strip()]


class MetricsLog:
    """Appends entries. One for a step that is already there replaces it and all later ones: the run was resumed.

    Args:
        fresh: ignore what an earlier run wrote.
    """

    def __init__(self, run: Folder, *, fresh: bool, tracker: Tracker | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._tracker = run, tracker
        self.entries: list[MetricEntry] = [] if fresh else read_metrics(run)
        self._events = run.path("tensorboard") if run.is_local else tempfile.mkdtemp(prefix="crem-tensorboard-")
        self._board = SummaryWriter(self._events)

    def write(self, progress: Progress) -> None:
        """Add the metrics of one interval. A number that is not finite becomes ``null``, which is JSON."""
        step = progress.step
        entry = {name: value if math.isfinite(value) else None for name, value in progress.as_dict().items()}
        self.entries = [e for e in self.entries if _step(e) < step] + [entry]
        text = "".join(json.dumps(e) + "\n" for e in self.entries)
        self._run.write_bytes(text.encode(), _FILE)
        numbers = {
            name if "/" in name else f"train/{name}": value
            for name, value in entry.items()
            if name != "step" and value is not None
        }
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._tracker is not None:
            self._tracker.log(numbers, step)

    def close(self, *, failed: bool = False) -> None:
        """Finish the event files, copy them to the run, and end the tracker's run."""
        self._board.close()
        if not self._run.is_local:
            for name in os.listdir(self._events):
                with open(os.path.join(self._events, name), "rb") as file:
                    self._run.write_bytes(file.read(), "tensorboard", name)
        if self._tracker is not None:
            try:
                self._tracker.close(failed=failed)
            except Exception:  # the trained model counts more than the tracker's record of it
                log.warning("the tracker's run could not be ended", exc_info=True)


def _step(entry: MetricEntry) -> float:
    step = entry["step"]
    assert step is not None, entry
    return step
