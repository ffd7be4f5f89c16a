"""The model of the lowest validation loss, kept in ``best/`` beside the run; ``best.json`` names its step and terms."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from crem.data.collator import Collator
from crem.distributed import rank, sum_over_ranks
from crem.train.callbacks import Callback, Interval
from crem.train.export import export
from crem.train.phases import Phase
from crem.train.progress import ValidationResult
from pipelines.tables.storage import Folder
from pipelines.training.uploads import upload_model

__all__ = ["BestModel", "BestRecord"]

_FILE = "best.json"


@dataclass(frozen=True)
class BestRecord:
    """``best.json``."""

    step: int
    fingerprint: str
    validation: ValidationResult

    def as_dict(self) -> dict[str, float | str]:
        """The file's keys; the validation terms are top-level keys, too."""
        return {"step": self.step, "fingerprint": self.fingerprint, **self.validation.as_dict()}


class BestModel(Callback):
    """Exports the model after each validation whose loss is the lowest so far; comes after ``Validation``.

    Every rank has one. Rank 0 decides for all, because an export is a collective.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Folder, engine: Any, collator: Collator):
        self._run, self._engine, self._collator = run, engine, collator
        kept = run.read_json(_FILE) if rank() == 0 else None  # what the run kept before it was resumed
        self._loss = float(kept["loss"]) if isinstance(kept, dict) else float("inf")

    def on_interval(self, interval: Interval) -> None:
        terms = interval.progress.validation
        if terms is None:
            return
        interval.enter(Phase.EXPORT)
        lower = rank() == 0 and terms.loss < self._loss
        if not bool(sum_over_ranks(torch.tensor(float(lower), device=self._engine.device))):
            return
        self._loss = terms.loss
        with tempfile.TemporaryDirectory() as folder:
            fingerprint = export(self._engine, self._collator, folder)
            if rank() == 0:
                self._run.remove(_FILE)  # without it the folder beside it does not count
                upload_model(folder, self._run.child("best"))
                self._run.write_json(BestRecord(interval.progress.step, fingerprint, terms).as_dict(), _FILE)
