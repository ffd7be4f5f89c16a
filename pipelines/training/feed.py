"""The stream of batches that one worker trains on, in the order of the run (``crem.data.mixing``).

Each worker has a Ray Data shard of its own, over *steps*: Ray Data gathers the rows of its steps from the object store
(which spills to disk), a window ahead of the device. ``ray.train.get_dataset_shard`` is not used: its split depends
on which block arrives first, and a resumed run would have to read again what it has seen. A window is materialised
rather than streamed: Ray Data's streaming executor polls while its consumer holds it back, which on a CPU machine cost
as much as the training. Images are decoded in the worker, in a thread beside the device.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from crem.config import RunConfig
from crem.data.items import TrainingExample
from crem.data.mixing import MixingPlan
from pipelines.tables.prepared import PreparedRows

if TYPE_CHECKING:  # data tasks carry rows and need neither torch nor transformers
    from crem.data.collator import Batch, Collator

__all__ = ["StepShare", "collate", "step_batches"]

_WINDOW_ROWS = 4096
"""Rows of one rank that are gathered ahead; two windows are in the object store at once."""
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class _Source:
    """Where data tasks find the rows of a run, and for whom they gather them."""

    rows: ray.ObjectRef
    """``PreparedRows``"""
    config: RunConfig = field(compare=False)
    rank: int = field(compare=False)
    ranks: int = field(compare=False)


@dataclass(frozen=True)
class StepShare:
    """One rank's rows of a step, before they are collated."""

    examples: list[TrainingExample]
    chorus_tokens: int | None
    """K' of the step; None is all K"""


def step_batches(
    rows: ray.ObjectRef, config: RunConfig, collator: Collator, *, start_step: int, rank: int, ranks: int
) -> Iterator[list[Batch]]:
    """This rank's share of each step from ``start_step`` to the end of the run, in chunks of ``train.chunk_rows``.

    Args:
        rows: ``PreparedRows`` in the object store.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    source, stop = _Source(rows, config, rank, ranks), config.train.steps
    size = max(1, _WINDOW_ROWS // (config.train.global_batch // ranks))
    starts = range(start_step, stop, size)
    with ThreadPoolExecutor(1) as windows, ThreadPoolExecutor(1) as collating:
        following = windows.submit(_window, range(start_step, min(stop, start_step + size)), source)
        ready: list[Future[list[Batch]]] = []
        for start in starts:
            window = following.result()
            assert window is not None
            following = windows.submit(_window, range(start + size, min(stop, start + 2 * size)), source)
            for block in window.iter_batches(batch_size=1, batch_format="pyarrow"):
                share = block.column("share")[0].as_py()
                ready.append(collating.submit(collate, share, collator, config, ranks))
                if len(ready) > _BATCHES_AHEAD:
                    yield ready.pop(0).result()
        for future in ready:
            yield future.result()


def _window(steps: range, source: _Source) -> ray.data.Dataset | None:
    """This rank's share of each of the steps, gathered into the object store; ``None`` for no steps."""
    if not steps:
        return None
    numbered = ray.data.range(len(steps), override_num_blocks=min(2, len(steps)))
    gathered = numbered.map_batches(
        _gather, batch_size=None, fn_kwargs={"first": steps.start, "source": source}, num_cpus=0.25
    )
    return gathered.materialize()


@lru_cache(maxsize=1)
def _opened(source: _Source) -> tuple[PreparedRows, MixingPlan]:
    """Rows and plan of the run that this data process serves; they are read from the object store once."""
    rows: PreparedRows = ray.get(source.rows)
    return rows, rows.plan(source.config)


def _gather(batch: dict[str, Any], *, first: int, source: _Source) -> dict[str, list[bytes]]:
    """In a data task: a pickled ``StepShare`` for each step ``first`` + id."""
    (rows, plan), config = _opened(source), source.config
    shares = []
    for step in (batch["id"] + first).tolist():
        planned = plan.step(step, rank=source.rank, ranks=source.ranks)
        examples = rows.examples(
            planned.rows,
            planned.z,
            (config.train.seed, step),
            retrieval=config.loss.alpha_r > 0,
            generation=config.loss.alpha_g > 0,
        )
        shares.append(pickle.dumps(StepShare(examples, planned.chorus_tokens), protocol=5))
    return {"share": shares}


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
