"""The model of the lowest validation loss, kept in ``best/`` beside the run; ``best.json`` says of which step it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch

from crem.data.collator import Collator
from crem.distributed import rank, sum_over_ranks
from crem.train.export import export
from pipelines.tables.storage import Folder

__all__ = ["BestModel"]

_FILE = "best.json"


class BestModel:
    """On every rank; what rank 0 decides holds for all, because an export is a collective.

    Args:
        upload: copies a finished checkpoint to a folder.
    """

    def __init__(self, run: Folder, upload: Callable[[str, Folder], None]):
        self._run, self._upload = run, upload
        held = run.read_json(_FILE) if rank() == 0 else None  # a resumed run knows what it has kept
        self._loss = float(held["loss"]) if isinstance(held, dict) else float("inf")

    def offer(self, step: int, terms: dict[str, float], engine: Any, collator: Collator) -> None:
        """Keep the model if its loss is the lowest so far."""
        lower = rank() == 0 and terms["loss"] < self._loss
        if not bool(sum_over_ranks(torch.tensor(float(lower), device=engine.device))):
            return
        self._loss = terms["loss"]
        with tempfile.TemporaryDirectory() as folder:
            fingerprint = export(engine, collator, folder)
            if rank() == 0:
                self._run.remove(_FILE)  # without it the folder beside it counts for nothing
                self._upload(folder, self._run.child("best"))
                self._run.write_json({"step": step, "fingerprint": fingerprint, **terms}, _FILE)
