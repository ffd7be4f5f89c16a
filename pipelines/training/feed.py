"""The stream of batches that one worker trains on, in the order of the run (``crem.data.mixing``).

Each worker has a Ray Data shard of its own, over *steps*: Ray Data gathers the rows of its steps from the object store
(it spills to disk), a window ahead of the device. ``ray.train.get_dataset_shard`` is not used: its split depends
on which block arrives first, and a resumed run would have to read again what it has seen. A window is materialised
rather than streamed: Ray Data's streaming executor polls while its consumer holds it back, and on a CPU machine
that cost as much as the training. Images are decoded in the worker, in a thread beside the device.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from crem.config import RunConfig

if TYPE_CHECKING:  # data workers carry rows and need neither torch nor transformers
    from crem.data.collator import Batch, Collator

__all__ = ["step_batches"]

_WINDOW_ROWS = 4096
"""Rows of one rank that are gathered ahead; two windows are held at once."""
_BATCHES_AHEAD = 2


def step_batches(
    rows_ref: Any, config: RunConfig, collator: Collator, *, start_step: int, rank: int, ranks: int
) -> Iterator[list[Batch]]:
    """This rank's share of each step from ``start_step`` to the end of the run, in chunks of ``train.chunk_rows``."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    size = max(1, _WINDOW_ROWS // (config.train.global_batch // ranks))
    starts = range(start_step, config.train.steps, size)
    spec = {"rows_ref": [rows_ref], "config": config, "rank": rank, "ranks": ranks}
    with ThreadPoolExecutor(1) as windows, ThreadPoolExecutor(1) as collating:
        following = windows.submit(_window, starts[0], config.train.steps, size, spec) if starts else None
        ready: list[Future[list[Batch]]] = []
        for start in starts:
            assert following is not None
            window = following.result()
            following = windows.submit(_window, start + size, config.train.steps, size, spec)
            for block in window.iter_batches(batch_size=1, batch_format="pyarrow"):
                ready.append(collating.submit(_collate, block.column("pairs")[0].as_py(), collator, config, ranks))
                if len(ready) > _BATCHES_AHEAD:
                    yield ready.pop(0).result()
        for future in ready:
            yield future.result()


def _window(start: int, stop: int, size: int, spec: dict[str, Any]) -> ray.data.Dataset | None:
    """Rows of the steps ``start`` … ``start + size`` - 1, gathered into the object store."""
    steps = range(start, min(stop, start + size))
    if not steps:
        return None
    numbered = ray.data.range(len(steps), override_num_blocks=min(2, len(steps)))
    return numbered.map_batches(
        _fetch, batch_size=None, fn_kwargs={"start": start, **spec}, num_cpus=0.25
    ).materialize()


_held: dict[str, Any] = {}
"""Rows and plan of the run that this data process serves; they are read from the object store once."""


def _fetch(
    batch: dict[str, Any], *, start: int, rows_ref: list[Any], config: RunConfig, rank: int, ranks: int
) -> dict[str, Any]:
    key = rows_ref[0].hex()
    if _held.get("key") != key:
        rows = ray.get(rows_ref[0])
        _held.update(key=key, rows=rows, plan=rows.plan(config))
    out = []
    for number in batch["id"].tolist():
        step = _held["plan"].step(start + number, rank=rank, ranks=ranks)
        pairs = _held["rows"].examples(
            step.rows,
            step.z,
            (config.train.seed, start + number),
            retrieval=config.loss.alpha_r > 0,
            generation=config.loss.alpha_g > 0,
        )
        out.append(pickle.dumps((pairs, step.chorus_tokens), protocol=5))
    return {"pairs": out}


def _collate(share: bytes, collator: Collator, config: RunConfig, ranks: int) -> list[Batch]:
    pairs, chorus_tokens = pickle.loads(share)
    size = len(pairs) // config.train.chunks(ranks)
    return [
        collator.examples(pairs[at : at + size], chorus_tokens=chorus_tokens, augment=config.data.augment)
        for at in range(0, len(pairs), size)
    ]
