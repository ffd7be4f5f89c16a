"""Checkpoints of the loop: every rank writes its part to local disk and hands it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from crem.config.training import TrainConfig
from crem.distributed import sum_over_ranks
from crem.train.callbacks import Callback, Interval, is_due
from crem.train.phases import Phase
from crem.train.state import save_state

__all__ = ["CheckpointWriter", "PartStore"]


class PartStore(Protocol):
    """Takes one rank's part of each checkpoint and stores it while training continues."""

    def make_room(self) -> None:
        """Called before a part is written: the one before it must leave the local disk."""

    def start(self, local: Path, step: int) -> None:
        """Store the part in ``local`` and remove it there."""


class CheckpointWriter(Callback):
    """Every ``train.checkpoint_every`` steps and after the last.

    Args:
        local: folder for this rank's part; does not exist between checkpoints.
        run: identity of the run (``crem.train.state.load_state``).
    """

    def __init__(
        self, engine: Any, store: PartStore, local: Path, config: TrainConfig, *, run: str, device: torch.device
    ):
        self._engine, self._store, self._local, self._config = engine, store, local, config
        self._run, self._device = run, device

    def due(self, done: int) -> bool:
        return is_due(done, self._config.checkpoint_every, self._config.steps)

    def on_interval(self, interval: Interval) -> None:
        done = interval.progress.step
        if not self.due(done):
            return
        interval.enter(Phase.CHECKPOINT)
        sum_over_ranks(torch.zeros(1, device=self._device))  # no rank writes before all have finished the step
        self._store.make_room()
        save_state(self._engine, self._local, step=done, run=self._run)
        self._store.start(self._local, done)
