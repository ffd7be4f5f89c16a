"""LoRA by PEFT: putting adapters into a backbone for training, and merging them into plain weights for a checkpoint."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from crem.config import ModelConfig
from crem.model.crem import CremModel

__all__ = ["adapt", "merged"]


def adapt(backbone: Qwen2VLForConditionalGeneration, chorus_ids: list[int], config: ModelConfig) -> Any:
    """The backbone with adapters: these and the chorus rows are trained in float32, all else is frozen."""
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


def merged(
    model: CremModel, state_dict: dict[str, Tensor] | None
) -> tuple[Qwen2VLForConditionalGeneration, dict[str, Tensor] | None]:
    """The backbone as a plain transformers model with the adapters merged; ``model`` stays as it is.

    Args:
        state_dict: full weights of ``model`` where they are partitioned (ZeRO-3).

    Returns:
        the plain model, and its weights where they are not in it.
    """
    if state_dict is not None:
        state_dict = {k.removeprefix("backbone."): v for k, v in state_dict.items()}
    if not hasattr(model.backbone, "merge_and_unload"):
        return model.core, state_dict
    if state_dict is None:
        copy: Any = deepcopy(model.backbone).cpu()
    else:
        # a partitioned model cannot be copied: rebuild its shape without weights and load the gathered ones
        with torch.device("meta"):
            # through a dict, which drops our vision attention
            config = type(model.core.config).from_dict(model.core.config.to_dict())
            bare = Qwen2VLForConditionalGeneration(config)
        copy = adapt(bare, model.chorus_ids, model.config)
        copy.load_state_dict(state_dict, strict=True, assign=True)
    with warnings.catch_warnings():  # PEFT mistakes embeddings that were loaded separately for untied ones
        warnings.filterwarnings("ignore", message=".*no longer tied.*")
        plain = copy.merge_and_unload()
    plain.config.tie_word_embeddings = model.core.config.tie_word_embeddings
    plain.generation_config = model.core.generation_config
    return plain, None
