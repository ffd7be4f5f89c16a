"""``crem graft``: a language model becomes the language half of a Qwen2-VL with a new vision tower.

Qwen2-VL's language model differs from Llama's in biases of q, k and v and in M-RoPE, whose three positions are equal on
text. With zero biases and the same rotary base it computes the same logits for text. The result is a stock Qwen2-VL
checkpoint with an untrained vision tower, which preset ``small-base`` trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crem.config import BackboneShape, GraftConfig, ImageConfig
from crem.errors import CheckpointError
from crem.fetch import local_copy
from crem.model.backbone import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    Qwen2VLForConditionalGeneration,
    config_from_shape,
    image_processor,
    initialise_by_fan_in,
)

__all__ = ["Grafted", "graft"]

_SAME = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""Fixed in the language half of Qwen2-VL."""
_SPARE_ROWS = 64
"""Spare rows of the embedding matrix for chorus tokens; the row count is rounded up to a multiple of it, which keeps
matrix products fast."""


@dataclass(frozen=True)
class Grafted:
    """A checkpoint that ``graft`` wrote."""

    out: str
    """its folder"""
    language_parameters: int
    vision_parameters: int
    """of the new vision tower"""


def graft(source: str, out: str | Path, config: GraftConfig, *, seed: int = 0) -> Grafted:
    """Write a Qwen2-VL checkpoint with the language model at ``source``, in float32.

    Args:
        source: a Llama-like causal language model: folder, URI or hub name with safetensors, or a ``.gguf`` file
            (dequantised; needs the package ``gguf``).
        out: a local folder.
        seed: of the weights of the vision tower.

    Raises:
        CheckpointError: ``source`` cannot be read, or is not of Llama's architecture.
    """
    language, tokenizer = _read(source)
    text = language.config
    wrong = [f"{key}={getattr(text, key)!r}" for key, wanted in _SAME.items() if getattr(text, key, wanted) != wanted]
    rope = dict(text.rope_parameters)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rope_type={rope['rope_type']!r}")
    if head_dim * text.num_attention_heads != text.hidden_size:
        wrong.append(f"head_dim={head_dim}")
    if text.model_type != "llama" or wrong:
        raise CheckpointError(
            f"{source!r} is a {text.model_type!r} model {' '.join(wrong)}; graft takes Llama's architecture with plain "
            "rotary positions, for example HuggingFaceTB/SmolLM2-135M-Instruct"
        )

    tokenizer.add_tokens([token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    rows = -(-(len(tokenizer) + _SPARE_ROWS) // _SPARE_ROWS) * _SPARE_ROWS
    shape = BackboneShape(
        vocab_size=rows,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=text.tie_word_embeddings,
        **config.model_dump(),
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    grafted = config_from_shape(shape, ids, rope_theta=rope["rope_theta"], rms_norm_eps=text.rms_norm_eps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(grafted)
        initialise_by_fan_in(model.model.visual)
    _take(model, language.state_dict())
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    for part in (model, tokenizer, image_processor(shape, None, ImageConfig())):
        part.save_pretrained(out)
    vision = sum(p.numel() for p in model.model.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    return Grafted(str(out), language_parameters=total - vision, vision_parameters=vision)


def _read(source: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        if source.endswith(".gguf"):
            folder, file = str(Path(source).parent), {"gguf_file": Path(source).name}
        else:
            folder, file = str(local_copy(source)), {}
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        safe = {} if file else {"use_safetensors": True}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file, **safe), tokenizer
    except CheckpointError:
        raise
    except Exception as error:  # of gguf, safetensors, transformers and the operating system
        raise CheckpointError(f"cannot read a language model at {source!r}: {type(error).__name__}: {error}") from error


@torch.no_grad()
def _take(model: Qwen2VLForConditionalGeneration, weights: dict[str, torch.Tensor]) -> None:
    """Copy Llama's weights into the language half; biases become 0, new rows the mean of the old ones."""
    language = model.model.language_model
    for name, parameter in language.named_parameters():
        source = weights.get(f"model.{name}")
        if source is None:
            assert name.endswith("_proj.bias"), f"the language model has no {name}"
            parameter.zero_()
        elif name == "embed_tokens.weight":
            _copy_rows(parameter, source)
        else:
            parameter.copy_(source)
    if not model.config.tie_word_embeddings:
        _copy_rows(model.lm_head.weight, weights["lm_head.weight"])


def _copy_rows(parameter: torch.Tensor, source: torch.Tensor) -> None:
    count = min(len(source), len(parameter))
    parameter[:count] = source[:count]
    new = parameter[count:]
    new.copy_(source.mean(0) + 0.02 * source.std() * torch.randn(new.shape, generator=torch.Generator().manual_seed(0)))
