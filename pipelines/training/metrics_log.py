"""Metrics of a training run: ``metrics.jsonl`` and TensorBoard event files in its output folder, always, and a tracker
where one is set (``pipelines.training.trackers``).

Training terms have plain names, those of held-out rows begin with ``validation/``. For a run on an object store the
JSON lines are written there after every entry; the event files lie on the driver's disk and are copied at its end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from typing import Any

from pipelines.tables.storage import Folder
from pipelines.training.trackers import Tracker

__all__ = ["MetricsLog", "read_metrics"]

log = logging.getLogger(__name__)

_FILE = "metrics.jsonl"


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """Entries of a run, by step."""
    if not run.exists(_FILE):
        return []
    with run.open(_FILE) as file:
        return [json.loads(line) for line in file.read().decode().splitlines() if line.strip()]


class MetricsLog:
    """Appends entries. One for a step that is already there replaces it and all later ones: the run was resumed."""

    def __init__(self, run: Folder, *, fresh: bool, tracker: Tracker | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._tracker = run, tracker
        self.entries = [] if fresh else read_metrics(run)
        self._events = run.path("tensorboard") if run.is_local else tempfile.mkdtemp(prefix="crem-tensorboard-")
        self._board = SummaryWriter(self._events)

    def write(self, entry: dict[str, Any]) -> None:
        """Add the metrics of one step. A number that is not finite becomes ``null``, which is JSON."""
        step = entry["step"]
        known = {name: value if math.isfinite(value) else None for name, value in entry.items()}
        self.entries = [e for e in self.entries if e["step"] < step] + [known]
        text = "".join(json.dumps(e) + "\n" for e in self.entries)
        self._run.write_bytes(text.encode(), _FILE)
        numbers = {
            name if "/" in name else f"train/{name}": value
            for name, value in known.items()
            if name != "step" and value is not None
        }
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._tracker is not None:
            self._tracker.log(numbers, step)

    def close(self, *, failed: bool = False) -> None:
        """Finish the event files, copy them where the run is, and end the tracker's run."""
        self._board.close()
        if not self._run.is_local:
            for name in os.listdir(self._events):
                with open(os.path.join(self._events, name), "rb") as file:
                    self._run.write_bytes(file.read(), "tensorboard", name)
        if self._tracker is not None:
            try:
                self._tracker.close(failed=failed)
            except Exception:  # a trained model is not thrown away because a tracker's server is gone
                log.warning("the tracker's run could not be ended", exc_info=True)
