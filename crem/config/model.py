"""Settings of the model: backbone, chorus tokens, adapters, prompt and bounds on images.

Sources of defaults, named at each field: *paper* is arXiv 2602.19091; *VLM2Vec-V2* is that project's public recipe for
the same backbone (Qwen2-VL-2B on 8 H100), used where the paper gives no value; *ours* is a choice of this project.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from crem.config.section import Section

__all__ = ["BackboneShape", "ImageConfig", "LoraSettings", "ModelConfig", "PromptConfig"]


class PromptConfig(Section):
    """The compression-based prompt (method.md §2)."""

    system: str = "You are a helpful assistant."
    """System turn; source: paper. An empty string drops the turn."""
    embedding_instruction: str = "Represent the given content for retrieval."
    """Instruction before the chorus tokens for a row without one. Source: ours, after VLM2Vec's task instructions."""
    generation_instruction: str = "Describe the content."
    """Instruction after the chorus tokens for a caller without one. Source: ours."""
    max_text_tokens: int = Field(1024, ge=1)
    """Longer texts are cut to this many tokens, and counted. Source: ours (VLM2Vec-V2: about 1k)."""
    max_answer_tokens: int = Field(256, ge=1)
    """Training answers are cut to this many tokens, and counted. Source: ours."""
    template_visible: bool = True
    """Whether Q and A may see the template tokens before the sample (system turn) when z = 1. Source: ours, because
    they hold nothing of the sample; the paper does not say."""


class ImageConfig(Section):
    """Bounds on images; checked on the header, before pixels are decoded."""

    min_pixels: int = Field(4 * 28 * 28, ge=1)
    """Smaller images are enlarged to this area in pixels. Source: VLM2Vec-V2 (4 x 28^2)."""
    max_pixels: int = Field(1280 * 28 * 28, ge=1)
    """Larger images are reduced to this area in pixels. Source: VLM2Vec-V2 (1280 x 28^2)."""
    max_source_pixels: int = Field(64_000_000, ge=1)
    """An encoded image whose header declares more pixels is rejected before it is decoded. Source: ours."""
    max_source_bytes: int = Field(32 * 2**20, ge=1)
    """An encoded image with more bytes is rejected before it is decoded. Source: ours."""
    allow_truncated: bool = False
    """Whether a JPEG or PNG whose end is missing is decoded as far as it goes, and counted. Source: ours."""
    max_images_per_item: int = Field(16, ge=1)
    """More images in one item are an error. Source: ours."""


class LoraSettings(Section):
    """Low-rank adaptation through PEFT; the chorus rows stay fully trainable."""

    r: int = Field(16, ge=1)
    """Source: VLM2Vec-V2."""
    alpha: int = Field(64, ge=1)
    """Source: VLM2Vec-V2."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Source: VLM2Vec-V2."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the language model with an adapter. Source: VLM2Vec-V2."""


class BackboneShape(Section):
    """A Qwen2-VL of any size, built from scratch (no pretrained weights). Names are transformers' own."""

    vocab_size: int = Field(2048, ge=300)
    hidden_size: int = Field(192, ge=8)
    intermediate_size: int = Field(512, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(6, ge=1)
    num_key_value_heads: int = Field(2, ge=1)
    max_position_embeddings: int = Field(4096, ge=64)
    vision_depth: int = Field(3, ge=1)
    vision_embed_dim: int = Field(128, ge=8)
    vision_num_heads: int = Field(4, ge=1)
    patch_size: int = Field(8, ge=2)
    spatial_merge_size: int = Field(2, ge=1)
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> BackboneShape:
        for width, heads, name in (
            (self.hidden_size, self.num_attention_heads, "hidden_size / num_attention_heads"),
            (self.num_attention_heads, self.num_key_value_heads, "num_attention_heads / num_key_value_heads"),
            (self.vision_embed_dim, self.vision_num_heads, "vision_embed_dim / vision_num_heads"),
        ):
            if width % heads:
                raise ValueError(f"{name} = {width} / {heads} is not an integer; choose a divisor")
        head_dim = self.hidden_size // self.num_attention_heads
        if head_dim % 2 or (self.vision_embed_dim // self.vision_num_heads) % 4:
            raise ValueError("rotary embedding needs an even text head size and a vision head size divisible by 4")
        return self


class ModelConfig(Section):
    """The backbone, the chorus tokens and what is trained."""

    backbone: str | None = "Qwen/Qwen2-VL-2B-Instruct"
    """Checkpoint directory, URI or hub name of a Qwen2-VL; ``null`` builds ``scratch``. Source: paper."""
    scratch: BackboneShape | None = None
    """Shape of a backbone trained from scratch; used where ``backbone`` is null."""
    chorus_tokens: int = Field(16, ge=0, le=256)
    """K. Source: paper, main results. 0 is the baseline without them: the hidden state of an end-of-text token
    is the embedding, as in VLM2Vec."""
    nested_chorus: tuple[int, ...] = ()
    """Chorus counts K' that training draws from, one per step; each can then be chosen at run time. Empty means K
    alone, as in the paper. Source: ours, after Matryoshka representations (arXiv 2205.13147)."""
    lora: LoraSettings | None = LoraSettings()
    """``null`` means full fine-tuning. Source: VLM2Vec-V2."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the weights at inference and of frozen weights in training. Source: VLM2Vec-V2 (bf16)."""
    gradient_checkpointing: bool = False
    """Recompute activations of each layer in the backward pass. Source: ours."""
    prompt: PromptConfig = PromptConfig()
    image: ImageConfig = ImageConfig()

    @model_validator(mode="after")
    def _one_backbone(self) -> ModelConfig:
        if (self.backbone is None) == (self.scratch is None):
            raise ValueError("set exactly one of model.backbone (pretrained) and model.scratch (from scratch)")
        return self

    @model_validator(mode="after")
    def _nested_counts(self) -> ModelConfig:
        wrong = [k for k in self.nested_chorus if not 1 <= k <= self.chorus_tokens]
        if wrong or (self.nested_chorus and max(self.nested_chorus) != self.chorus_tokens):
            raise ValueError(
                f"model.nested_chorus={list(self.nested_chorus)} must lie between 1 and model.chorus_tokens="
                f"{self.chorus_tokens} and include it"
            )
        return self

    @property
    def chorus_counts(self) -> tuple[int, ...]:
        """The chorus counts that a model of this configuration supports, ascending."""
        return tuple(sorted(set(self.nested_chorus))) or (self.chorus_tokens,)
