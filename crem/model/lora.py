"""LoRA by PEFT: adapters and chorus rows are trained in float32, all else is frozen."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLForConditionalGeneration

from crem.config import ModelConfig

__all__ = ["adapt"]


def adapt(backbone: Qwen2VLForConditionalGeneration, chorus_ids: list[int], config: ModelConfig) -> Any:
    """The backbone with LoRA by PEFT: adapters and chorus rows are trained in float32, all else is frozen."""
    from peft import LoraConfig, get_peft_model

    assert config.lora is not None
    names = "|".join(config.lora.targets)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=rf".*language_model.*\.({names})",
        trainable_token_indices=chorus_ids if config.chorus_tokens else None,  # the new rows are trained in full
    )
    adapted = get_peft_model(backbone, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
