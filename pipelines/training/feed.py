"""The stream of batches that one worker trains on, in the order of the run (``crem.data.mixing``).

The corpus stays in storage. A worker knows the row numbers of all its steps, because their order is a pure function of
seed and step. For a *window* of coming steps a Ray Data task, on any node, fetches the texts and images of these rows
from storage, each once. Its result waits in Ray's object store (which spills to disk) until the device gets there; if
its node dies, Ray makes the window again. ``ray.train.get_dataset_shard`` is not used: its split depends on which block
arrives first, and a resumed run would have to read again what it has seen. Windows are materialised rather than
streamed: Ray Data's streaming executor polls while its consumer holds it back, which on a CPU machine cost as much as
the training. Images are decoded in the worker, in a thread beside the device.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
import ray.data

from crem.config import RunConfig
from crem.data.items import TrainingExample
from crem.data.mixing import MixingPlan, StepRows
from crem.errors import CremError
from pipelines.tables.prepared import load_rows, training_examples
from pipelines.tables.ray_tasks import TASK, task_dataset
from pipelines.tables.row_index import RowIndex

if TYPE_CHECKING:  # data tasks carry rows and need neither torch nor transformers
    from crem.data.collator import Batch, Collator

__all__ = ["StepShare", "WindowSize", "collate", "step_batches"]

_WINDOWS = 2
"""Windows of a rank that are fetched together, by one task each. While they are trained on the next ones are fetched,
so that the object store holds twice as many."""
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class StepShare:
    """One rank's rows of a step, before they are collated."""

    examples: list[TrainingExample]
    chorus_tokens: int | None
    """K' of the step; None is all K"""


@dataclass
class WindowSize:
    """How many steps a window has: few at first, so that training begins; then as many as its bounds allow."""

    rows_per_step: int
    """of one rank"""
    rows: float = 64
    """of the next window"""
    max_rows: int = 2048
    max_bytes: int = 64 * 2**20
    growth: float = 4

    @property
    def steps(self) -> int:
        return max(1, int(self.rows) // self.rows_per_step)

    def seen(self, steps: int, size_bytes: int) -> None:
        """Learn from a window of so many steps and bytes how large the next may be."""
        bytes_per_row = max(1.0, size_bytes / (steps * self.rows_per_step))
        self.rows = min(self.growth * self.rows, self.max_rows, self.max_bytes / bytes_per_row)


@dataclass(frozen=True)
class _Window:
    """What a data task fetches: one rank's rows of consecutive steps."""

    first: int
    """the first of the steps"""
    steps: list[StepRows]
    places: RowIndex
    """of the rows, one after the other"""
    config: RunConfig


def step_batches(
    rows: RowIndex,
    images: ray.ObjectRef,
    config: RunConfig,
    collator: Collator,
    *,
    start_step: int,
    rank: int,
    ranks: int,
    window: WindowSize | None = None,
) -> Iterator[list[Batch]]:
    """This rank's share of each step from ``start_step`` to the end of the run, in chunks of ``train.chunk_rows``.

    Args:
        rows: to train on.
        images: ``ImageIndex`` in the object store.
        window: of the first; by default as small as a batch or two.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    plan, stop = rows.plan(config), config.train.steps
    size = window or WindowSize(config.train.global_batch // ranks)

    def fetch(steps: range, window_steps: int) -> ray.data.Dataset | None:
        starts = range(steps.start, steps.stop, window_steps)
        windows = [range(at, min(at + window_steps, steps.stop)) for at in starts]
        return _fetched([_window(w, rows, plan, config, rank=rank, ranks=ranks) for w in windows], images)

    with ThreadPoolExecutor(1) as fetching, ThreadPoolExecutor(1) as collating:

        def begin(start: int) -> tuple[range, Future[ray.data.Dataset | None]]:
            steps = range(start, min(stop, start + _WINDOWS * size.steps))
            return steps, fetching.submit(fetch, steps, size.steps)

        steps, following = begin(start_step)
        ready: list[Future[list[Batch]]] = []
        while steps:
            fetched, done = following.result(), len(steps)
            assert fetched is not None
            size.seen(done, fetched.size_bytes())
            steps, following = begin(steps.stop)
            for block in fetched.iter_batches(batch_size=1, batch_format="pyarrow"):
                ready.append(collating.submit(collate, _share_in(block), collator, config, ranks))
                if len(ready) > _BATCHES_AHEAD:
                    yield ready.pop(0).result()
        for future in ready:
            yield future.result()


def _window(steps: range, rows: RowIndex, plan: MixingPlan, config: RunConfig, *, rank: int, ranks: int) -> _Window:
    planned = [plan.step(step, rank=rank, ranks=ranks) for step in steps]
    return _Window(steps.start, planned, rows.select(np.concatenate([p.rows for p in planned])), config)


def _fetched(windows: list[_Window], images: ray.ObjectRef) -> ray.data.Dataset | None:
    """The shares of the steps of some windows, in the object store; ``None`` for no windows."""
    if not windows:
        return None
    dataset = task_dataset(windows).map_batches(
        _gather,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"images": images},  # Ray must see the reference: one that is pickled with a window is never found
        num_cpus=0.25,
    )
    return dataset.materialize()


def _gather(batch: pa.Table, *, images: ray.ObjectRef) -> Iterator[dict[str, list[bytes]]]:
    """In a data task: a pickled ``StepShare`` for each step of a window, or the pickled error that the user sees."""
    window: _Window = pickle.loads(batch.column(TASK)[0].as_py())
    try:
        rows = load_rows(window.places, ray.get(images))
    except CremError as error:
        yield {"share": [b""], "error": [pickle.dumps(error)]}
        return
    config, at = window.config, 0
    for step, planned in enumerate(window.steps, window.first):
        examples = training_examples(
            rows.table.slice(at, len(planned.rows)).to_pylist(),
            planned.rows,
            planned.z,
            rows.image,
            (config.train.seed, step),
            retrieval=config.loss.alpha_r > 0,
            generation=config.loss.alpha_g > 0,
        )
        at += len(planned.rows)
        share = pickle.dumps(StepShare(examples, planned.chorus_tokens), protocol=5)
        yield {"share": [share], "error": [b""]}


def _share_in(block: pa.Table) -> bytes:
    """The pickled ``StepShare``; raises the error of the task that was to make it."""
    if error := block.column("error")[0].as_py():
        raise pickle.loads(error)
    share: bytes = block.column("share")[0].as_py()
    return share


def collate(pickled: bytes, collator: Collator, config: RunConfig, ranks: int) -> list[Batch]:
    """The chunks of a pickled ``StepShare``."""
    share: StepShare = pickle.loads(pickled)
    size = len(share.examples) // config.train.chunks(ranks)
    return [
        collator.examples(
            share.examples[at : at + size], chorus_tokens=share.chorus_tokens, augment=config.data.augment
        )
        for at in range(0, len(share.examples), size)
    ]
