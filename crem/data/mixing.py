"""Which row goes to which step: a pure function of seed and step.

A batch mixes retrieval rows (with their homogeneous generation turns) and heterogeneous generation rows in fixed
shares. Each of the two streams is the concatenation of its epochs, every epoch a permutation of its rows, so no row
is skipped or repeated within an epoch. Where tasks are not sampled by their size (``data.source_temperature``), every
task is a stream of its own. Nothing depends on the number of workers or on what was read before: a resumed run starts
at its step, and rank r of W takes the r-th of W equal slices of the same global batch. The number of chorus tokens of
a step, for nested training, is drawn here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from crem.config import DataConfig
from crem.errors import ConfigError

__all__ = ["MixingPlan", "StepRows"]


class _Draw(IntEnum):
    """Second word of the seed (the run's seed, this, step or epoch) of each random draw.

    A changed value changes the order of every run. Source: ours, any distinct small numbers.
    """

    RETRIEVAL = 0
    """order of the retrieval rows within an epoch"""
    HETEROGENEOUS = 1
    """order of the heterogeneous rows within an epoch"""
    STEP = 7
    """order of the rows within a step, and their compression bits"""
    CHORUS = 11
    """number of chorus tokens of a step"""
    TASKS = 13
    """number of rows that a step takes from each task"""


def _task_draw(task: int, stream: _Draw) -> int:
    """Order of the rows of one task within an epoch."""
    return 2 + 2 * task + stream


@dataclass(frozen=True)
class StepRows:
    """Rows of one step or of one rank's slice of it."""

    rows: NDArray[np.int64]
    """[n] row numbers in the prepared table"""
    z: NDArray[np.bool_]
    """[n] compression bit of each row"""
    chorus_tokens: int | None = None
    """K' of the step, the same on every rank; None is all K"""


@dataclass
class MixingPlan:
    """The order of a run.

    Args:
        retrieval: row numbers with a query and a target.
        heterogeneous: row numbers with a generation turn only.
        tasks: task number of every row, for source-homogeneous sub-batches and sampling by task.
        chorus_counts: the numbers of chorus tokens that steps draw from, evenly.
    """

    retrieval: NDArray[np.int64]
    heterogeneous: NDArray[np.int64]
    tasks: NDArray[np.int64]
    global_batch: int
    seed: int
    compression_probability: float
    config: DataConfig
    chorus_counts: tuple[int, ...] = ()
    _epochs: dict[int, tuple[int, NDArray[np.int64]]] = field(default_factory=dict, repr=False)
    """by draw, the epoch that was asked for last and its order: steps go on, so 8 bytes a row are enough"""
    _taken: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)
    _by_task: dict[int, dict[int, NDArray[np.int64]]] = field(default_factory=dict, repr=False)

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
                self._stream(self.retrieval, _Draw.RETRIEVAL, step, paired),
                self._stream(self.heterogeneous, _Draw.HETEROGENEOUS, step, self.global_batch - paired),
            ]
        )
        draw = np.random.default_rng([self.seed, _Draw.STEP, step])
        order = draw.permutation(len(rows))
        if self.config.sub_batch:
            order = self._in_runs(order, self.tasks[rows], draw)
        z = draw.random(len(rows)) < self.compression_probability
        share = len(rows) // ranks
        mine = slice(rank * share, (rank + 1) * share)
        return StepRows(rows[order][mine], z[order][mine], self._chorus_tokens(step))

    def _chorus_tokens(self, step: int) -> int | None:
        if len(self.chorus_counts) <= 1:
            return None
        return int(np.random.default_rng([self.seed, _Draw.CHORUS, step]).choice(self.chorus_counts))

    def _in_runs(
        self, order: NDArray[np.int64], task_of_row: NDArray[np.int64], draw: np.random.Generator
    ) -> NDArray[np.int64]:
        """``order`` in runs of one task: the full runs shuffled, then the shorter rest of each task."""
        size = self.config.sub_batch
        full: list[NDArray[np.int64]] = []
        rest: list[NDArray[np.int64]] = []
        for task in np.unique(task_of_row):
            members = order[task_of_row[order] == task]
            runs = [members[i : i + size] for i in range(0, len(members), size)]
            full += [run for run in runs if len(run) == size]
            rest += [run for run in runs if len(run) < size]
        return np.concatenate([runs[i] for runs in (full, rest) for i in draw.permutation(len(runs))])

    def _stream(self, rows: NDArray[np.int64], stream: _Draw, step: int, count: int) -> NDArray[np.int64]:
        """``count`` rows of a step: by size from all rows, or from each task the number that the step draws for it."""
        if self.config.source_temperature == 1 or not count:
            return self._take(rows, stream, step * count, count)
        members = self._rows_by_task(rows, stream)
        weights = np.array([len(m) for m in members.values()]) ** (1 / self.config.source_temperature)
        taken = self._taken_before(stream, step + 1, count, weights / weights.sum())
        parts = [
            self._take(members[task], _task_draw(task, stream), int(before), int(after - before))
            for task, before, after in zip(members, taken[step], taken[step + 1], strict=True)
        ]
        return np.concatenate(parts)

    def _rows_by_task(self, rows: NDArray[np.int64], stream: _Draw) -> dict[int, NDArray[np.int64]]:
        """Rows of each task in ascending order of tasks; grouped once, because a step needs few of all rows."""
        if stream not in self._by_task:
            order = np.argsort(self.tasks[rows], kind="stable")
            tasks, starts = np.unique(self.tasks[rows][order], return_index=True)
            self._by_task[stream] = dict(zip(tasks.tolist(), np.split(rows[order], starts[1:]), strict=True))
        return self._by_task[stream]

    def _taken_before(self, stream: _Draw, steps: int, count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
        """[steps + 1 or more, tasks]: rows of each task taken before each step."""
        known = self._taken.get(stream, np.zeros((1, len(shares)), dtype=np.int64))
        if len(known) <= steps:
            more = [
                np.random.default_rng([self.seed, _Draw.TASKS, stream, s]).multinomial(count, shares)
                for s in range(len(known) - 1, max(steps, 2 * len(known)))
            ]
            known = self._taken[stream] = np.concatenate([known, known[-1] + np.cumsum(more, axis=0)])
        return known

    def _take(self, rows: NDArray[np.int64], draw: int, start: int, count: int) -> NDArray[np.int64]:
        """``count`` rows from position ``start`` of the endless sequence of epochs."""
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, at = divmod(start + done, len(rows))
            part = self._epoch(rows, draw, epoch)[at : at + count - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def _epoch(self, rows: NDArray[np.int64], draw: int, epoch: int) -> NDArray[np.int64]:
        known = self._epochs.get(draw)
        if known is None or known[0] != epoch:
            known = self._epochs[draw] = (epoch, np.random.default_rng([self.seed, draw, epoch]).permutation(rows))
        return known[1]
