"""Floating-point operations of a training step that are useful, and what the device could do: their ratio is the
model-FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).

Counted are matrix products and attention, each tower at its own number of tokens:

- a weight matrix costs 2 FLOPs per element and token forward, 2 more for the gradient of its input, 2 more for its own
  where it is trained: 6 when trained, 4 when frozen beneath trained parts (LoRA), 2 when nothing before it is trained;
- attention costs 4 x width per visible pair of query and key forward, twice that backward; causal and
  compression-aware attention are counted at the pairs that they see, not at the square;
- the LM head at answer positions alone, the vision tower at the distinct images.

Not counted, because no result needs it: padding, and what gradient caching or checkpointing computes again. Left out,
because small: norms, activations, softmax, InfoNCE.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crem.data.collator import Batch
from crem.data.prompts import Segment
from crem.model.attention import hidden_from_answer
from crem.model.crem import CremModel

__all__ = ["BF16_PEAKS", "ModelFlops", "peak_flops", "visible_pairs"]

BF16_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
"""Dense bf16 FLOP/s by name of the device. Source: the makers' data sheets, without sparsity."""
_MEASURE_S = 0.3
_SIDE = {"cpu": 768, "cuda": 8192}
"""Side of the matrices of the measurement: large enough to be bound by arithmetic."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward per unit of work, for one model as it is trained."""

    per_token: float
    """of the language model's matrices"""
    per_patch: float
    """of the vision tower's blocks"""
    per_vision_token: float
    """of the vision tower's merger"""
    per_answer_token: float
    """of the LM head"""
    per_text_pair: float
    """of attention over all layers of the language model, for a visible pair"""
    per_vision_pair: float
    merge_area: int
    """patches per vision token"""
    template_visible: bool

    @classmethod
    def of(cls, model: CremModel) -> ModelFlops:
        """Of a model whose parameters are marked as trained or frozen (also partitioned by ZeRO-3)."""
        core = model.core
        text, vision = core.config.text_config, core.config.vision_config
        sees = any(p.requires_grad for p in core.model.visual.parameters())
        costs = {"text": 0.0, "patch": 0.0, "merger": 0.0, "head": 0.0}
        for name, module in core.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv3d):
                continue
            part = _part(name)
            own = 2 * int(module.weight.requires_grad)
            below = 0 if name.endswith("patch_embed.proj") else 2 * int(sees or part in ("text", "head"))
            costs[part] += (2 + below + own) * getattr(module.weight, "ds_numel", module.weight.numel())
        width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
        return cls(
            per_token=costs["text"],
            per_patch=costs["patch"],
            per_vision_token=costs["merger"],
            per_answer_token=costs["head"],
            per_text_pair=12.0 * width * text.num_hidden_layers,
            per_vision_pair=(12.0 if sees else 4.0) * vision.embed_dim * vision.depth,
            merge_area=vision.spatial_merge_size**2,
            template_visible=model.config.prompt.template_visible,
        )

    def of_batch(self, batch: Batch) -> float:
        """Useful FLOPs of one forward and backward of a batch; cheap where the batch is on the CPU."""
        patches = vision_pairs = 0
        if batch.image_grid_thw is not None:
            frames_I, area_I = batch.image_grid_thw[:, 0], batch.image_grid_thw[:, 1] * batch.image_grid_thw[:, 2]
            patches, vision_pairs = int((frames_I * area_I).sum()), int((frames_I * area_I**2).sum())
        return (
            self.per_token * batch.tokens
            + self.per_text_pair * visible_pairs(batch, template_visible=self.template_visible)
            + self.per_answer_token * int(batch.answer_tokens)
            + self.per_patch * patches
            + self.per_vision_token * (patches // self.merge_area)
            + self.per_vision_pair * vision_pairs
        )


def _part(name: str) -> str:
    if "visual." in name:
        return "merger" if ".merger." in name else "patch"
    return "head" if "lm_head" in name else "text"


def visible_pairs(batch: Batch, *, template_visible: bool = True) -> int:
    """Pairs of query and key that compression-aware attention lets see each other: causal ones, less those of every
    token of Q and A with every hidden key, where z = 1 (``crem.model.attention``)."""
    ids, segments = batch.sequence_ids.flatten(), batch.segments.flatten()
    real = ids >= 0
    count = len(batch.z)

    def per_sequence(chosen: Tensor) -> Tensor:
        return torch.bincount(ids[chosen & real], minlength=count)

    length_N = per_sequence(real)
    cut_N = per_sequence(segments >= Segment.Q) * per_sequence(hidden_from_answer(segments, template_visible))
    return int((length_N * (length_N + 1) // 2 - batch.z * cut_N).sum())


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s that the device can do at most, and where the figure comes from.

    A GPU in bf16 is looked up by its name; everything else, CPUs above all, is measured once by a matrix product in the
    precision of the run and with its threads.
    """
    if device.type == "cuda" and precision == "bfloat16":
        name = torch.cuda.get_device_name(device)
        known = [key for key in BF16_PEAKS if key in name]
        if known:
            return BF16_PEAKS[max(known, key=len)], f"data sheet of {name}"
    return _measured(
        device, torch.bfloat16 if precision == "bfloat16" else torch.float32
    ), "measured by a matrix product"


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = float("inf"), time.perf_counter() + _MEASURE_S
    while time.perf_counter() < end or best == float("inf"):
        wait()
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best
