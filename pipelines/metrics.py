"""Metrics of a training run: ``metrics.jsonl`` and TensorBoard event files in its output folder.

For a run on an object store the JSON lines are written there after every entry; the event files lie on the driver's
disk and are copied when the run ends.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from pipelines.storage import Folder

__all__ = ["MetricsLog", "read_metrics"]

_FILE = "metrics.jsonl"


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """Entries of a run, by step."""
    if not run.exists(_FILE):
        return []
    with run.open(_FILE) as file:
        return [json.loads(line) for line in file.read().decode().splitlines() if line.strip()]


class MetricsLog:
    """Appends entries. One for a step that is already there replaces it and all later ones: the run was resumed."""

    def __init__(self, run: Folder, *, fresh: bool):
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._entries = [] if fresh else read_metrics(run)
        self._events = run.path("tensorboard") if run.is_local else tempfile.mkdtemp(prefix="crem-tensorboard-")
        self._board = SummaryWriter(self._events)

    def write(self, entry: dict[str, Any]) -> None:
        """Add the metrics of one step."""
        self._entries = [e for e in self._entries if e["step"] < entry["step"]] + [entry]
        text = "".join(json.dumps(e) + "\n" for e in self._entries)
        self._run.write_bytes(text.encode(), _FILE)
        for name, value in entry.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, entry["step"])
        self._board.flush()

    def close(self) -> None:
        """Finish the event files, and copy them where the run is."""
        self._board.close()
        if not self._run.is_local:
            for name in os.listdir(self._events):
                with open(os.path.join(self._events, name), "rb") as file:
                    self._run.write_bytes(file.read(), "tensorboard", name)
