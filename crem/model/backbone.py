"""Qwen2-VL: its shapes, tokenizer and image processor, and faster forms of its attention.

Choices:
- Always the PIL image processor, never torchvision's: the two resize differently, and batch and online embedding must
  read the same pixels on every machine.
- The vision tower's patches are projected by a matrix product, not a convolution.
- The vision tower's attention is grouped: images with the same number of patches share one batched call. transformers'
  ``sdpa`` path calls once per image (128 images x 3 layers were a third of a training step on CPU).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from crem.config import BackboneShape, ImageConfig
from crem.errors import ConfigError
from crem.model.attention import TWO_PART, attend

__all__ = [
    "CHAT_TEMPLATE",
    "SPECIAL_TOKENS",
    "Qwen2VLForConditionalGeneration",
    "blank_image",
    "compile_layers",
    "config_from_shape",
    "image_features",
    "image_processor",
    "initialise_by_fan_in",
    "model_from_shape",
    "tokenizer_from_texts",
    "use_fast_attention",
]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's chat format, for checkpoints trained from scratch."""

# The name contains "flash" because transformers' vision tower then makes one call for the entire batch, with
# cu_seqlens, instead of one call per image.
_GROUPED = "crem_grouped_flash"


def _grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Block-diagonal attention over packed images.

    ``query``, ``key``, ``value`` are [1, heads, patches, width]; returns [1, patches, heads, width].
    """
    bounds = kwargs["cu_seq_lens_q"].tolist()
    lengths = np.diff(bounds)
    out = torch.empty_like(query) if len(set(lengths)) > 1 else None
    for length in sorted(set(lengths)):
        if out is None:
            q, k, v = (t[0].unflatten(1, (-1, length)).transpose(0, 1) for t in (query, key, value))
            all_images = attend(q, k, v, scale=kwargs["scaling"])  # images, heads, length, width
            return all_images.transpose(1, 2).flatten(0, 1)[None], None
        starts = torch.tensor([b for b, n in zip(bounds, lengths, strict=False) if n == length], device=query.device)
        index = (starts[:, None] + torch.arange(length, device=query.device)).flatten()
        q, k, v = (t[0, :, index].unflatten(1, (-1, length)).transpose(0, 1) for t in (query, key, value))
        some = attend(q, k, v, scale=kwargs["scaling"])
        out = out.index_copy(2, index, some.transpose(0, 1).flatten(1, 2)[None])
    assert out is not None
    return out.transpose(1, 2), None


AttentionInterface.register(_GROUPED, torch.compiler.disable(_grouped_attention))  # loops over the batch's images


class _PatchProjection(torch.nn.Conv3d):
    """The patch embedding's convolution as one matrix product: the same, because stride and kernel are equal.

    Shares the convolution's parameter and the parameter's name. PyTorch's Conv3d took an eighth of a training step on
    CPU and is slow in bf16 on GPUs.
    """

    def __init__(self, conv: torch.nn.Conv3d):
        assert conv.stride == conv.kernel_size and conv.bias is None, conv
        with torch.device("meta"):
            t, h, w = conv.kernel_size
            super().__init__(conv.in_channels, conv.out_channels, (t, h, w), (t, h, w), bias=False)
        self.weight = conv.weight

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.flatten(1), self.weight.flatten(1))


def use_fast_attention(model: Qwen2VLForConditionalGeneration) -> None:
    """Speed the model up without changing its results, its parameters or the saved configuration.

    In the vision tower, attention is batched over images of equal size, and patches are projected by one matrix
    product. In the language model, attention uses the batch's two-part plan where there is one.
    """
    _attend_by(model.model.visual, _GROUPED)
    _attend_by(model.model.language_model, TWO_PART)
    visual = model.model.visual
    if not isinstance(visual.patch_embed.proj, _PatchProjection):
        visual.patch_embed.proj = _PatchProjection(visual.patch_embed.proj)


def compile_layers(model: Qwen2VLForConditionalGeneration) -> None:
    """``torch.compile`` of every layer of both towers, in place, for any number of tokens; attention stays as it is.

    Layers, not the model: all layers of a tower share one compiled piece of code, and what differs between batches
    (places of the images, groups of the attention) is outside. Parameters and their names stay.

    Raises:
        ConfigError: there is no C++ compiler, which torch needs to compile for this device.
    """
    if model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ConfigError("train.compile needs a C++ compiler; run: apt-get install g++, or set train.compile=false")
    # the default, 8, is too low: two towers, with and without gradient, training and evaluation, first and other layers
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    for layer in (*model.model.visual.blocks, *model.model.language_model.layers):
        layer.compile(dynamic=True)


def _attend_by(tower: Any, name: str) -> None:
    config = deepcopy(tower.config)  # the model's own config stays as it was: it is saved
    config._attn_implementation = name
    for module in tower.modules():
        if hasattr(module, "config"):
            module.config = config


def image_processor(shape: BackboneShape | None, source: str | Path | None, bounds: ImageConfig) -> Any:
    """The image processor of a scratch shape or of the checkpoint at ``source``, with our pixel bounds."""
    size = {"shortest_edge": bounds.min_pixels, "longest_edge": bounds.max_pixels}
    if source is not None:
        # under both names: min_pixels and max_pixels of a published preprocessor_config.json override a size
        bounded = {"size": size, "min_pixels": bounds.min_pixels, "max_pixels": bounds.max_pixels, "do_resize": True}
        return Qwen2VLImageProcessorPil.from_pretrained(str(source), **bounded)
    assert shape is not None
    return Qwen2VLImageProcessorPil(patch_size=shape.patch_size, merge_size=shape.spatial_merge_size, size=size)


def tokenizer_from_texts(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer of at most ``vocab_size`` ids with Qwen2's special tokens.

    Any text round-trips, because all 256 bytes are in the vocabulary. Deterministic for the same texts.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    bpe = json.loads(raw.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def model_from_shape(shape: BackboneShape, tokenizer: Any, seed: int) -> Qwen2VLForConditionalGeneration:
    """A randomly initialised Qwen2-VL of the given shape, float32."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    grown = shape.model_copy(update={"vocab_size": max(shape.vocab_size, len(tokenizer))})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config_from_shape(grown, ids))
        initialise_by_fan_in(model)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return cast(Qwen2VLForConditionalGeneration, model)


def config_from_shape(
    shape: BackboneShape, ids: Mapping[str, int], *, rope_theta: float = 10_000.0, rms_norm_eps: float = 1e-5
) -> Qwen2VLConfig:
    """transformers' configuration of a shape; ``ids`` are those of ``SPECIAL_TOKENS``."""
    half = shape.hidden_size // shape.num_attention_heads // 2
    spatial = half * 3 // 8  # Qwen2-VL splits 64 frequencies 16 : 24 : 24
    return Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "max_position_embeddings": shape.max_position_embeddings,
            "rms_norm_eps": rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rope_theta,
                "mrope_section": [half - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_embed_dim,
            "num_heads": shape.vision_num_heads,
            "hidden_size": shape.hidden_size,
            "patch_size": shape.patch_size,
            "spatial_merge_size": shape.spatial_merge_size,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.tie_word_embeddings,
    )


@torch.no_grad()
def initialise_by_fan_in(model: torch.nn.Module) -> None:
    """Matrices ~ N(0, 1 / fan-in), embeddings at half that width.

    transformers' fixed 0.02 suits widths of thousands; at a width of 128 the loss did not fall in the first 100 steps.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = 0.5 if "embed_tokens" in name else 1.0
            torch.nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)


def image_features(
    model: Qwen2VLForConditionalGeneration, pixel_values: Tensor | None, grids: Tensor | None, index: Tensor | None
) -> dict[str, BaseModelOutputWithPooling] | None:
    """Output of the vision tower for every place [J] of an image, from one pass over the distinct images [I]."""
    if pixel_values is None or grids is None or index is None:
        return None
    out = model.model.get_image_features(pixel_values, grids, return_dict=True)
    return {"image": BaseModelOutputWithPooling(pooler_output=tuple(out.pooler_output[i] for i in index.tolist()))}  # type: ignore[arg-type]


def blank_image(model: Qwen2VLForConditionalGeneration) -> tuple[Tensor, Tensor]:
    """The smallest image the vision tower takes, in zeros: patches float32 [merge^2, patch length], grid [1, 3]."""
    vision = model.config.vision_config
    length = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merge = vision.spatial_merge_size
    return torch.zeros(merge * merge, length), torch.tensor([[1, merge, merge]])
