"""Which row goes to which step: a pure function of seed and step.

A batch mixes retrieval rows (with their homogeneous generation turns) and heterogeneous generation rows in fixed
shares. Each of the two streams is the concatenation of its epochs, every epoch a permutation of its rows, so no row
is skipped or seen twice within an epoch. Nothing depends on the number of workers or on what was read before: a
resumed run starts at its step, and rank r of W takes the r-th of W equal slices of the same global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from crem.config import DataConfig
from crem.errors import ConfigError

__all__ = ["MixingPlan", "StepRows"]


@dataclass(frozen=True)
class StepRows:
    """Rows of one step or of one rank's slice of it."""

    rows: NDArray[np.int64]
    """[n] row numbers in the prepared table"""
    z: NDArray[np.bool_]
    """[n] compression bit of each row"""


@dataclass
class MixingPlan:
    """The order of a run.

    Args:
        retrieval: row numbers with a query and a target.
        heterogeneous: row numbers with a generation turn only.
        tasks: task number of every row, for source-homogeneous sub-batches.
    """

    retrieval: NDArray[np.int64]
    heterogeneous: NDArray[np.int64]
    tasks: NDArray[np.int64]
    global_batch: int
    seed: int
    compression_probability: float
    config: DataConfig
    _epochs: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.retrieval) + len(self.heterogeneous) == 0:
            raise ConfigError("the prepared table has no training row; check its split column and manifest.json")

    @property
    def retrieval_per_step(self) -> int:
        """Retrieval rows of each global batch."""
        if not len(self.heterogeneous):
            return self.global_batch
        return round(self.global_batch * self.config.retrieval_share) if len(self.retrieval) else 0

    def step(self, step: int, *, rank: int = 0, ranks: int = 1) -> StepRows:
        """This rank's rows of a step, with their compression bits."""
        paired = self.retrieval_per_step
        rows = np.concatenate(
            [
                self._take(self.retrieval, 0, step * paired, paired),
                self._take(self.heterogeneous, 1, step * (self.global_batch - paired), self.global_batch - paired),
            ]
        )
        draw = np.random.default_rng([self.seed, 7, step])
        order = draw.permutation(len(rows))
        if self.config.sub_batch:
            order = self._in_runs(order, self.tasks[rows], draw)
        z = draw.random(len(rows)) < self.compression_probability
        share = len(rows) // ranks
        mine = slice(rank * share, (rank + 1) * share)
        return StepRows(rows[order][mine], z[order][mine])

    def _in_runs(
        self, order: NDArray[np.int64], task_of_row: NDArray[np.int64], draw: np.random.Generator
    ) -> NDArray[np.int64]:
        """``order`` in runs of one task, the whole runs shuffled; what is left of each task comes after them."""
        size = self.config.sub_batch
        whole: list[NDArray[np.int64]] = []
        rest: list[NDArray[np.int64]] = []
        for task in np.unique(task_of_row):
            members = order[task_of_row[order] == task]
            runs = [members[i : i + size] for i in range(0, len(members), size)]
            whole += [run for run in runs if len(run) == size]
            rest += [run for run in runs if len(run) < size]
        return np.concatenate([runs[i] for runs in (whole, rest) for i in draw.permutation(len(runs))])

    def _take(self, stream: NDArray[np.int64], number: int, start: int, count: int) -> NDArray[np.int64]:
        """``count`` rows from position ``start`` of the endless sequence of epochs."""
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, at = divmod(start + done, len(stream))
            part = self._epoch(stream, number, epoch)[at : at + count - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def _epoch(self, stream: NDArray[np.int64], number: int, epoch: int) -> NDArray[np.int64]:
        key = (number, epoch)
        if key not in self._epochs:
            if len(self._epochs) > 8:
                self._epochs.clear()
            self._epochs[key] = np.random.default_rng([self.seed, number, epoch]).permutation(stream)
        return self._epochs[key]
