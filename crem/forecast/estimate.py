"""What a run needs: memory on each worker, the fewest devices of a size, and the time. Arithmetic; starts nothing.

Time is work over speed: the FLOPs that a step executes (``crem.forecast.flops``) over the device's peak times
``UTILISATION``, an assumption.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from crem.config import BackboneShape, RunConfig
from crem.forecast.devices import CPU_THREAD_FLOPS, DEVICES, Device
from crem.forecast.flops import Load, ModelFlops
from crem.forecast.memory import DeviceMemory, Weights, activations, device_memory, weights_of
from crem.forecast.shapes import meta_model, shape_of

__all__ = ["ASKED_DEVICES", "UTILISATION", "Forecast", "Need", "TaskShare", "assumed_row", "forecast", "full_chunk"]

UTILISATION = 0.35
"""Share of the peak that a step reaches. An assumption: what is common for models of this size; not measured here."""
ASKED_DEVICES = tuple(d for name in ("H100", "A100", "L4") for d in DEVICES if d.name == name)
"""Devices that a forecast is made for: one of each common size, 80, 40 and 24 GB."""


@dataclass(frozen=True)
class Need:
    """The fewest devices of a size for a global batch, or why none are enough."""

    device: Device
    workers: int | None
    """None where no number of them is enough"""
    chunk_rows: int
    memory: DeviceMemory
    """on each of ``workers``, or on each of as many as the batch has rows"""
    seconds: float
    """of the whole run"""


@dataclass(frozen=True)
class TaskShare:
    """Rows of one task, and what a step takes of them."""

    task: str
    retrieval: int
    with_turn: int
    """of the retrieval rows, those with a homogeneous generation turn"""
    heterogeneous: int
    share: float
    """of a batch"""
    epochs: float
    """of its retrieval rows, or of its heterogeneous rows where it has no others"""


@dataclass(frozen=True)
class Forecast:
    """What a run needs."""

    config: RunConfig
    weights: Weights
    row: Load
    chunk: Load
    chunk_rows: int
    memory: DeviceMemory
    """on each worker of the configuration"""
    needs: list[Need]
    step_flops: float
    worker_peak: float
    """FLOP/s of the device that ``seconds`` assumes"""
    seconds: float
    tasks: list[TaskShare] = field(default_factory=list)
    epochs: tuple[float, float] | None = None
    """of all retrieval rows and of all heterogeneous rows"""
    notes: list[str] = field(default_factory=list)


def forecast(
    config: RunConfig,
    row: Load | None = None,
    chunk: Load | None = None,
    *,
    tasks: list[TaskShare] | None = None,
    epochs: tuple[float, float] | None = None,
    notes: list[str] | None = None,
) -> Forecast:
    """Forecast a run.

    Args:
        row: an average row; ``assumed_row`` where None.
        chunk: the largest chunk of ``train.chunk_rows`` rows; ``full_chunk`` where None.

    Raises:
        ConfigError: a backbone of unknown shape. CheckpointError: one that is no Qwen2-VL.
    """
    shape = shape_of(config.model)
    backbone = meta_model(config.model)
    weights, flops = weights_of(backbone), ModelFlops.of_backbone(backbone)
    chunk_rows = rows_of_chunk(config)
    row, chunk = row or assumed_row(config, shape), chunk or full_chunk(config, shape, chunk_rows)
    workers, on_gpu = config.train.workers, config.train.gpus_per_worker > 0
    peak = ASKED_DEVICES[0].peak_flops
    if not on_gpu:
        peak = CPU_THREAD_FLOPS[config.train.precision] * min(config.train.threads_per_worker, os.cpu_count() or 1)
    step = step_flops(config, flops, row, config.train.chunks(workers) > 1)
    return Forecast(
        config=config,
        weights=weights,
        row=row,
        chunk=chunk,
        chunk_rows=chunk_rows,
        memory=device_memory(config, weights, activations(shape, chunk, config, cuda=on_gpu), workers, cuda=on_gpu),
        needs=[need(config, shape, weights, flops, row, chunk, d) for d in ASKED_DEVICES] if on_gpu else [],
        step_flops=step,
        worker_peak=peak,
        seconds=_seconds(config, step, workers, peak),
        tasks=tasks or [],
        epochs=epochs,
        notes=notes or [],
    )


def rows_of_chunk(config: RunConfig) -> int:
    """Rows that a worker has in memory at once."""
    return config.train.chunk_rows or config.train.global_batch // config.train.workers


def step_flops(config: RunConfig, flops: ModelFlops, row: Load, cached: bool) -> float:
    """FLOPs of one step over the global batch."""
    recomputed = config.model.gradient_checkpointing
    return config.train.global_batch * flops.executed(row, cached=cached, recomputed=recomputed)


def _seconds(config: RunConfig, step: float, workers: int, peak: float) -> float:
    return config.train.steps * step / (workers * peak * UTILISATION)


def need(
    config: RunConfig,
    shape: BackboneShape,
    weights: Weights,
    flops: ModelFlops,
    row: Load,
    chunk: Load,
    device: Device,
) -> Need:
    """The smallest number of devices on which the global batch fits, with the configured chunks if they fit anywhere,
    else with halves of them, then halves of those.

    Args:
        chunk: of ``rows_of_chunk`` rows, as large as such chunks get; others are taken in proportion.
    """
    batch, given = config.train.global_batch, config.train.chunk_rows
    counts = [n for n in range(1, batch + 1) if batch % n == 0]
    candidates = [(given or batch // n, n) for n in counts]
    smaller = [1 << power for power in reversed(range(16)) if 1 << power < (given or batch)]
    candidates += [(size, n) for size in smaller for n in counts]
    for size, workers in candidates:
        if batch // workers % size:
            continue
        load = chunk.scaled(size / rows_of_chunk(config))
        memory = device_memory(config, weights, activations(shape, load, config), workers)
        if fits := memory.total <= device.memory_gb * 1e9:
            break
    step = step_flops(config, flops, row, batch // workers > size)
    return Need(device, workers if fits else None, size, memory, _seconds(config, step, workers, device.peak_flops))


def full_chunk(config: RunConfig, shape: BackboneShape, rows: int) -> Load:
    """The largest chunk that a preset allows with one image of full size in each query and each target.

    Texts are at their limits only in the answers; a text beside a full image is taken as 128 tokens (ours).
    """
    vision = config.model.image.max_pixels // (shape.patch_size * shape.spatial_merge_size) ** 2
    beside = 128 + config.model.chorus_tokens + 32
    answer = config.model.prompt.max_answer_tokens
    return Load(
        tokens=rows * (2 * (vision + beside) + answer),
        patches=rows * 2 * vision * shape.spatial_merge_size**2,
        answer_tokens=rows * answer,
        sequences=2 * rows,
    )


def assumed_row(config: RunConfig, shape: BackboneShape) -> Load:
    """An average row where there are no tables: 1,430 tokens of context (the paper's mean) beside a short text."""
    context, target, answer = 1430.0, 64.0, 64.0
    vision = min(context - 150, config.model.image.max_pixels / (shape.patch_size * shape.spatial_merge_size) ** 2)
    tokens = vision + 150 + target + answer + 2 * config.model.chorus_tokens
    patches = vision * shape.spatial_merge_size**2
    sequences = 1 + config.data.retrieval_share
    return Load(
        tokens=tokens,
        patches=patches,
        answer_tokens=answer * 0.5,
        sequences=sequences,
        images=1,
        text_pairs=tokens * tokens / sequences / 2,  # causal: half of the square of each sequence's length
        vision_pairs=patches**2,
    )
