"""CREM: one multimodal language model that both embeds and generates (arXiv 2602.19091).

K chorus tokens follow the image and the text. Their mean last-layer state is the embedding. For a share p of the
samples, question and answer do not attend to image and text (``crem.model.attention``), so the answer has to come from
the chorus tokens alone. Both losses read the same forward of ``[S V T U Q A]``:

    hidden = backbone(tokens, mask(segments, z))         one pass
    embedding = normalise(mean(hidden at U))             retrieval: L_r
    logits = lm_head(hidden before each A)               generation: L_g; only these positions enter the LM head

Three ways to use the model after one prefill of ``[S V T U]`` (method.md §5): the embedding; native generation,
which keeps the keys and values of the entire prefix; compressed generation, which keeps those of the chorus tokens
only, at their original positions (``crem.model.generation``).

Shape suffixes: N sequences in B rows of T tokens, D model width, A answer tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, Qwen2VLForConditionalGeneration

from crem.config import ModelConfig
from crem.data.collator import Batch
from crem.data.prompts import Segment
from crem.model.attention import compression_aware_mask
from crem.model.backbone import blank_image, image_features, use_fast_attention
from crem.model.chorus import pool

__all__ = ["CremModel", "CremOutput"]


class CremOutput(NamedTuple):
    """Result of one training forward. A tuple, because DeepSpeed looks for tensors in tuples and not in dataclasses."""

    embeddings: Tensor
    """float32 [N, D], unit length"""
    lm_loss_sum: Tensor
    """float32 scalar: sum over this batch's answer tokens of -log p; divide by the *global* number of tokens"""
    answer_tokens: Tensor
    """int64 scalar: answer tokens in this batch"""


class CremModel(nn.Module):
    """A Qwen2-VL with chorus tokens and compression-aware attention.

    Args:
        backbone: the plain transformers model, or a PEFT model around one.
        chorus_ids: ids of the K chorus tokens.
        config: prompt, attention and image settings.
        stock_folder: folder the backbone was read from; checkpoints get the publisher's other files from there.
    """

    def __init__(
        self, backbone: nn.Module, chorus_ids: list[int], config: ModelConfig, stock_folder: Path | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.stock_folder = stock_folder
        self.chorus_ids = chorus_ids
        self.config = config
        use_fast_attention(self.core)

    @property
    def core(self) -> Qwen2VLForConditionalGeneration:
        """The plain transformers model, with LoRA layers in place where PEFT put them."""
        backbone: Any = self.backbone
        return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, batch: Batch, *, embed_only: bool = False) -> CremOutput:
        """Embeddings of all sequences and the LM loss of those with an answer, from one pass.

        ``embed_only`` leaves the LM head out; the loss is then 0.
        """
        if self.training and batch.pixel_values is None:
            batch = self.with_blank_image(batch)
        hidden_BTD, _ = self.encode(batch)
        embeddings_ND = pool(hidden_BTD, batch.segments, batch.chorus_tokens)
        if embed_only:
            return CremOutput(embeddings_ND, hidden_BTD.new_zeros(()), batch.answer_tokens)
        return CremOutput(embeddings_ND, self._lm_loss(hidden_BTD, batch), batch.answer_tokens)

    def encode(self, batch: Batch, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """Last-layer states [B, T, D]; fills ``cache`` where one is given (one sequence per row)."""
        mask = None
        if batch.two_part is None and (batch.packed or bool(batch.z.any())):
            visible = self.config.prompt.template_visible
            mask = compression_aware_mask(batch.segments, batch.sequence_ids, batch.z, template_visible=visible)
        out = self.core.model(
            input_ids=batch.input_ids,
            attention_mask={"full_attention": mask},
            position_ids=batch.position_ids,
            mm_encoder_outputs=image_features(self.core, batch.pixel_values, batch.image_grid_thw, batch.image_index),
            past_key_values=cache,
            use_cache=cache is not None,
            two_part=batch.two_part,
        )
        return out.last_hidden_state, cache

    def with_blank_image(self, batch: Batch) -> Batch:
        """The batch with one vision token after the last sequence, to which nothing attends.

        Under ZeRO-3 every rank must run the same modules in the same order, even a rank without an image.
        """
        pixels, grids = blank_image(self.core)
        device = batch.input_ids.device
        ids = F.pad(batch.input_ids, (0, 1))
        ids[0, -1] = self.core.config.image_token_id
        return replace(
            batch,
            input_ids=ids,
            segments=F.pad(batch.segments, (0, 1), value=int(Segment.PAD)),
            sequence_ids=F.pad(batch.sequence_ids, (0, 1), value=-1),
            position_ids=F.pad(batch.position_ids, (0, 1)),
            pixel_values=pixels.to(device),
            image_grid_thw=grids.to(device),
            image_index=torch.zeros(1, dtype=torch.long, device=device),
            two_part=batch.two_part and batch.two_part.with_token(),
        )

    def _lm_loss(self, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """Sum of -log p over the answer tokens; only the positions before them enter the LM head."""
        before_answer_BT = batch.segments[:, 1:] == Segment.A
        if batch.answer_tokens == 0:  # a rank without answers must join the LM head's collectives (ZeRO-3)
            return 0.0 * self.core.lm_head(hidden_BTD[:, :1]).float().sum()
        logits_AV = self.core.lm_head(hidden_BTD[:, :-1][before_answer_BT]).float()
        return F.cross_entropy(logits_AV, batch.input_ids[:, 1:][before_answer_BT], reduction="sum")
