"""How many devices a run needs, and how long it takes: arithmetic over ``crem.forecast.memory`` and the rows' tokens.

Time is work over speed. Work: 2 operations for each weight and token in a product, forward; as much again for the
gradient of its input, and again for that of a trained weight (Kaplan et al., arXiv 2001.08361, section 2.1); plus
attention's products over the tokens that a query sees. Gradient caching embeds every chunk once more, and gradient
checkpointing runs every layer once more. Speed: the device's peak times ``UTILISATION``, an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from crem.config import BackboneShape, RunConfig
from crem.forecast.memory import Chunk, DeviceMemory, Weights, activations, device_memory

__all__ = [
    "CPU_THREAD_FLOPS",
    "DEVICES",
    "UTILISATION",
    "Device",
    "Need",
    "RowSize",
    "assumed_row",
    "full_chunk",
    "needs",
    "row_flops",
    "scaled",
    "step_flops",
]

UTILISATION = 0.35
"""Share of the peak that a step reaches. An assumption: what is common for models of this size; not measured here."""


@dataclass(frozen=True)
class Device:
    """An accelerator: its memory in units of 10^9 bytes, its dense bf16 peak, operations a second."""

    name: str
    size_gb: int
    peak_flops: float


DEVICES = (
    Device("80 GB (H100)", 80, 989e12),
    Device("40 GB (A100)", 40, 312e12),
    Device("24 GB (L4)", 24, 121e12),
)
"""Sizes asked about. Source: NVIDIA's data sheets, dense bf16. What is sold as 80 GB has a little over 80e9 bytes."""
CPU_THREAD_FLOPS = {"float32": 40e9, "bfloat16": 97e9}
"""Peak of one thread with AVX-512. Source: half of what was measured on two (80 and 195 GFLOP/s at 2048^3)."""


@dataclass(frozen=True)
class RowSize:
    """A row of the batch on average: its query with the generation turn, its target, its negatives."""

    tokens: float
    patches: float
    answer_tokens: float
    sequences: float
    images: float
    """distinct ones"""


@dataclass(frozen=True)
class Need:
    """The fewest devices of a size for a global batch, or why there are none."""

    device: Device
    workers: int | None
    chunk_rows: int
    memory: DeviceMemory
    """on each of ``workers``; where none is enough, on each of as many as the batch has rows"""


def row_flops(shape: BackboneShape, row: RowSize) -> tuple[float, float, float]:
    """Operations of one forward pass of an average row: language model, vision tower, LM head."""
    D, F, E = shape.hidden_size, shape.intermediate_size, shape.vision_embed_dim
    kv_width = D // shape.num_attention_heads * shape.num_key_value_heads
    layer = D * (2 * D + 2 * kv_width) + 3 * D * F
    length = row.tokens / max(1.0, row.sequences)
    text = shape.num_hidden_layers * row.tokens * (2 * layer + 2 * length * D)  # causal: half of 4 x length x D
    merged = E * shape.spatial_merge_size**2
    merger = row.patches / shape.spatial_merge_size**2 * 2 * (merged * merged + merged * D)
    block = 2 * 12 * E * E + 4 * row.patches / max(1e-9, row.images) * E
    patch = 2 * 3 * 2 * shape.patch_size**2 * E
    return (
        text,
        row.patches * (shape.vision_depth * block + patch) + merger,
        2 * row.answer_tokens * D * shape.vocab_size,
    )


def step_flops(shape: BackboneShape, row: RowSize, config: RunConfig, workers: int) -> float:
    """Operations of one step over the global batch: everything that is computed, recomputation too."""
    text, vision, head = row_flops(shape, row)
    full = config.model.lora is None
    cached = config.train.chunks(workers) > 1
    again = config.model.gradient_checkpointing
    backward = 2 if full else 1  # adapters need the gradients of inputs alone; their own products are small
    passes_text = cached + 1 + backward + again
    passes_vision = cached + 1 + (2 + again if full else 0)  # a frozen tower has no backward pass
    return config.train.global_batch * (passes_text * text + passes_vision * vision + (1 + backward) * head)


def needs(
    config: RunConfig, shape: BackboneShape, weights: Weights, chunk: Chunk, device: Device, *, rows: int
) -> Need:
    """The smallest number of devices on which the global batch fits, with the preset's chunks if they fit anywhere.

    Args:
        chunk: of ``rows`` rows, as large as chunks of so many get; others are taken in proportion.
    """
    batch = config.train.global_batch
    counts = [n for n in range(1, batch + 1) if batch % n == 0]
    given = config.train.chunk_rows
    ways = [(given or batch // n, n) for n in counts]
    # halves of what was asked for, then halves of those
    smaller = [1 << power for power in reversed(range(16)) if 1 << power < (given or batch)]
    ways += [(size, n) for size in smaller for n in counts]
    last: Need | None = None
    for size, workers in ways:
        if batch // workers % size:
            continue
        memory = device_memory(config, weights, activations(shape, scaled(chunk, size / rows), config), workers)
        if memory.total <= device.size_gb * 1e9:
            return Need(device, workers, size, memory)
        last = Need(device, None, size, memory)
    assert last is not None, (rows, batch)
    return last


def scaled(chunk: Chunk, share: float) -> Chunk:
    """A chunk of the same kind of rows, ``share`` as large."""
    return replace(
        chunk,
        tokens=round(chunk.tokens * share),
        patches=round(chunk.patches * share),
        answer_tokens=round(chunk.answer_tokens * share),
        sequences=max(1, round(chunk.sequences * share)),
        attended=None if chunk.attended is None else round(chunk.attended * share),
    )


def full_chunk(config: RunConfig, shape: BackboneShape, rows: int) -> Chunk:
    """The largest chunk that a preset allows with one image of full size in each query and each target.

    Texts are at their limits only in the answers; a text beside a full image is taken as 128 tokens (ours).
    """
    pixels = (shape.patch_size * shape.spatial_merge_size) ** 2
    vision = config.model.image.max_pixels // pixels
    beside = 128 + config.model.chorus_tokens + 32
    answer = config.model.prompt.max_answer_tokens
    per_row = 2 * (vision + beside) + answer
    return Chunk(
        tokens=rows * per_row,
        patches=rows * 2 * vision * shape.spatial_merge_size**2,
        answer_tokens=rows * answer,
        sequences=2 * rows,
    )


def assumed_row(config: RunConfig, shape: BackboneShape) -> RowSize:
    """An average row where there are no tables: 1,430 tokens of context (the paper's mean) beside a short text."""
    context, target, answer = 1430.0, 64.0, 64.0
    vision = min(context - 150, config.model.image.max_pixels / (shape.patch_size * shape.spatial_merge_size) ** 2)
    return RowSize(
        tokens=vision + 150 + target + answer + 2 * config.model.chorus_tokens,
        patches=vision * shape.spatial_merge_size**2,
        answer_tokens=answer * 0.5,
        sequences=1 + config.data.retrieval_share,
        images=1,
    )
