"""Floating-point operations of a model as it is trained: the one derivation, for the utilisation of a run and for its
forecast.

Counted are matrix products and attention, each tower at its own number of tokens:

- a weight matrix costs 2 FLOPs per element and token forward, 2 more for the gradient of its input, 2 more for its own
  gradient where it is trained: 6 when trained, 4 when frozen above trained parts (LoRA), 2 when nothing before it is
  trained (Kaplan et al., arXiv 2001.08361, section 2.1);
- attention costs 4 x width per visible pair of query and key forward, twice that backward; causal and
  compression-aware attention are counted at the pairs that they see, not at the square;
- the LM head at answer positions alone, the vision tower at the distinct images.

``useful`` leaves out what no result needs: padding, and what gradient caching or checkpointing computes again. Its
ratio to the peak of the device is the model-FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B). ``executed`` counts
what a step really computes. Norms, activations, softmax and InfoNCE are small and left out of both.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from crem.data.collator import Batch
from crem.data.packing import hidden_from_answer
from crem.data.prompts import Segment
from crem.model.crem import CremModel

__all__ = ["Load", "ModelFlops", "PartFlops", "visible_pairs"]


@dataclass(frozen=True)
class Load:
    """What goes through the model: a batch, a chunk of one, or a row on average."""

    tokens: float
    """of the language model, without padding"""
    patches: float
    """of the distinct images"""
    answer_tokens: float
    sequences: float
    images: float = 0.0
    """distinct ones"""
    text_pairs: float = 0.0
    """visible pairs of query and key"""
    vision_pairs: float = 0.0
    """pairs of patches of one image"""
    attended: float | None = None
    """queries of attention with the padding of its groups; ``tokens`` where None"""

    @classmethod
    def of(cls, batch: Batch, *, template_visible: bool = True) -> Load:
        """Of a batch; cheap where it is on the CPU."""
        images = patches = vision_pairs = 0
        if batch.image_grid_thw is not None:
            frames_I, area_I = batch.image_grid_thw[:, 0], batch.image_grid_thw[:, 1] * batch.image_grid_thw[:, 2]
            images, patches = len(frames_I), int((frames_I * area_I).sum())
            vision_pairs = int((frames_I * area_I**2).sum())
        groups = batch.two_part.groups if batch.two_part else ()
        return cls(
            tokens=batch.tokens,
            patches=patches,
            answer_tokens=int(batch.answer_tokens),
            sequences=len(batch.z),
            images=images,
            text_pairs=visible_pairs(batch, template_visible=template_visible),
            vision_pairs=vision_pairs,
            attended=sum(group.queries_GQ.numel() for group in groups) or None,
        )

    def __add__(self, other: Load) -> Load:
        attended = (self.attended or self.tokens) + (other.attended or other.tokens)
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "attended"}
        return Load(**sums, attended=attended)

    def scaled(self, share: float) -> Load:
        """As much of the same kind, ``share`` times as large."""
        amounts = {f.name: getattr(self, f.name) * share for f in fields(self) if f.name != "attended"}
        return Load(**amounts, attended=None if self.attended is None else self.attended * share)


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part of the model for a load, forward and backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per unit of work; each pair is (forward, backward)."""

    per_token: PartFlops
    """of the language model's matrices"""
    per_text_pair: PartFlops
    """of attention over all layers of the language model, for a visible pair"""
    per_patch: PartFlops
    """of the vision tower's blocks"""
    per_vision_token: PartFlops
    """of the vision tower's merger"""
    per_vision_pair: PartFlops
    per_answer_token: PartFlops
    """of the LM head"""
    merge_area: int
    """patches per vision token"""
    template_visible: bool

    @classmethod
    def of(cls, model: CremModel) -> ModelFlops:
        """Of a model whose parameters are marked as trained or frozen (also partitioned by ZeRO-3)."""
        return cls.of_backbone(model.core, template_visible=model.config.prompt.template_visible)

    @classmethod
    def of_backbone(cls, core: Any, *, template_visible: bool = True) -> ModelFlops:
        """Of the plain transformers model, with adapters in place where PEFT put them; may be on the meta device."""
        text, vision = core.config.text_config, core.config.vision_config
        vision_trained = any(p.requires_grad for p in core.model.visual.parameters())
        forward = dict.fromkeys(("text", "patch", "merger", "head"), 0.0)
        backward = dict(forward)
        for name, module in core.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv3d):
                continue
            part = _part(name)
            size = getattr(module.weight, "ds_numel", module.weight.numel())
            input_needs_gradient = (vision_trained or part in ("text", "head")) and not name.endswith(
                "patch_embed.proj"
            )
            forward[part] += 2 * size
            backward[part] += 2 * size * (int(input_needs_gradient) + int(module.weight.requires_grad))
        parts = {part: PartFlops(forward[part], backward[part]) for part in forward}
        width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
        text_pair = 4.0 * width * text.num_hidden_layers
        vision_pair = 4.0 * vision.embed_dim * vision.depth
        return cls(
            per_token=parts["text"],
            per_text_pair=PartFlops(text_pair, 2 * text_pair),
            per_patch=parts["patch"],
            per_vision_token=parts["merger"],
            per_vision_pair=PartFlops(vision_pair, 2 * vision_pair * vision_trained),
            per_answer_token=parts["head"],
            merge_area=vision.spatial_merge_size**2,
            template_visible=template_visible,
        )

    def by_part(self, load: Load) -> tuple[PartFlops, PartFlops, PartFlops]:
        """One forward and backward of ``load``: language model, vision tower, LM head."""
        return (
            _sum((load.tokens, self.per_token), (load.text_pairs, self.per_text_pair)),
            _sum(
                (load.patches, self.per_patch),
                (load.patches / self.merge_area, self.per_vision_token),
                (load.vision_pairs, self.per_vision_pair),
            ),
            _sum((load.answer_tokens, self.per_answer_token)),
        )

    def useful(self, load: Load) -> float:
        """FLOPs that the result of one forward and backward needs."""
        return sum(part.total for part in self.by_part(load))

    def of_batch(self, batch: Batch) -> float:
        """``useful`` of a batch."""
        return self.useful(Load.of(batch, template_visible=self.template_visible))

    def executed(self, load: Load, *, cached: bool, recomputed: bool) -> float:
        """FLOPs that a step computes for ``load``.

        Args:
            cached: gradient caching runs both towers once more, without the LM head.
            recomputed: gradient checkpointing runs every layer once more in the backward pass of its tower.
        """
        text, vision, head = self.by_part(load)
        again = cached * (text.forward + vision.forward) + recomputed * text.forward
        return text.total + vision.total + head.total + again + recomputed * bool(vision.backward) * vision.forward


def _sum(*terms: tuple[float, PartFlops]) -> PartFlops:
    return PartFlops(*(sum(count * getattr(cost, way) for count, cost in terms) for way in ("forward", "backward")))


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
