"""What passes between the driver and the workers of a run: a specification to the workers, messages to the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.queue import Queue

from crem.config import RunConfig
from crem.train.progress import Progress
from pipelines.tables.storage import Folder

__all__ = ["Exported", "Message", "Resumed", "WorkerSpec", "WorkerWarning"]


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker is given; the same for every rank and every start."""

    config: RunConfig
    texts: list[str] | None
    """what a scratch model's tokenizer is trained on; None for a pretrained backbone"""
    rows: ray.ObjectRef
    """``RowIndex`` of the rows to train on"""
    images: ray.ObjectRef
    """``ImageIndex``"""
    held_out: ray.ObjectRef | None
    """``PreparedRows`` to validate on; None without validation"""
    queue: Queue
    """takes each ``Message`` to the driver"""
    heartbeats: Any
    """handle of the actor that receives heartbeats (``watch.HangWatch.board``)"""
    out: Folder
    """of the run"""
    run: str
    """identity of the run; its checkpoints carry it"""


@dataclass(frozen=True)
class WorkerWarning:
    """From any rank: something that the user should know and that does not end the run."""

    text: str


@dataclass(frozen=True)
class Resumed:
    """From rank 0: training continues from a checkpoint."""

    step: int
    """the first step to make"""
    workers: int


@dataclass(frozen=True)
class Exported:
    """From rank 0, its last message: the trained model is in its place."""

    model: str
    """URI"""
    fingerprint: str
    steps: int
    parameters: int


Message = WorkerWarning | Resumed | Progress | Exported
"""``Progress`` comes from rank 0 at every log interval."""
