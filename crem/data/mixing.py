"""Which row goes to which step: a pure function of seed and step.

A batch mixes retrieval rows (with their homogeneous generation turns) and heterogeneous generation rows in fixed
shares. Each of the two streams is the concatenation of its epochs, every epoch a permutation of its rows, so no row
is skipped or seen twice within an epoch. Where tasks are not sampled by their size (``data.source_temperature``), every
task is such a stream of its own. Nothing depends on the number of workers or on what was read before: a resumed run
starts at its step, and rank r of W takes the r-th of W equal slices of the same global batch. The number of chorus
tokens of a step, for nested training, is drawn here too.
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
    _epochs: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, repr=False)
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
                self._stream(self.retrieval, 0, step, paired),
                self._stream(self.heterogeneous, 1, step, self.global_batch - paired),
            ]
        )
        draw = np.random.default_rng([self.seed, 7, step])
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
        return int(np.random.default_rng([self.seed, 11, step]).choice(self.chorus_counts))

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

    def _stream(self, rows: NDArray[np.int64], number: int, step: int, count: int) -> NDArray[np.int64]:
        """``count`` rows of a step: by size from all rows, or from each task the number that the step draws for it."""
        if self.config.source_temperature == 1 or not count:
            return self._take(rows, number, step * count, count)
        members = self._rows_by_task(rows, number)
        weights = np.array([len(m) for m in members.values()]) ** (1 / self.config.source_temperature)
        taken = self._taken_before(number, step + 1, count, weights / weights.sum())
        parts = [
            self._take(members[task], 2 + 2 * task + number, int(before), int(after - before))
            for task, before, after in zip(members, taken[step], taken[step + 1], strict=True)
        ]
        return np.concatenate(parts)

    def _rows_by_task(self, rows: NDArray[np.int64], number: int) -> dict[int, NDArray[np.int64]]:
        """Rows of each task in ascending order of tasks; sorted out once, because a step looks at few of all rows."""
        if number not in self._by_task:
            order = np.argsort(self.tasks[rows], kind="stable")
            tasks, starts = np.unique(self.tasks[rows][order], return_index=True)
            self._by_task[number] = dict(zip(tasks.tolist(), np.split(rows[order], starts[1:]), strict=True))
        return self._by_task[number]

    def _taken_before(self, number: int, steps: int, count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
        """[steps + 1 or more, tasks]: rows of each task taken before each step."""
        known = self._taken.get(number, np.zeros((1, len(shares)), dtype=np.int64))
        if len(known) <= steps:
            more = [
                np.random.default_rng([self.seed, 13, number, s]).multinomial(count, shares)
                for s in range(len(known) - 1, max(steps, 2 * len(known)))
            ]
            known = self._taken[number] = np.concatenate([known, known[-1] + np.cumsum(more, axis=0)])
        return known

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
            if len(self._epochs) > 256:
                self._epochs.clear()
            self._epochs[key] = np.random.default_rng([self.seed, number, epoch]).permutation(stream)
        return self._epochs[key]
