"""True shapes of backbones, and models of them that take no memory, so that a run can be forecast before it starts.

Sources: ``config.json`` of Qwen/Qwen2-VL-2B-Instruct and Qwen/Qwen2-VL-7B-Instruct on the Hugging Face hub.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from crem.config import BackboneShape, ImageConfig, ModelConfig
from crem.errors import CheckpointError, ConfigError
from crem.fetch import shipped
from crem.model.backbone import SPECIAL_TOKENS, Qwen2VLForConditionalGeneration, config_from_shape
from crem.model.lora import adapt
from crem.model.pretrained import backbone_config

__all__ = ["PUBLISHED", "image_patches", "meta_model", "shape_of"]

_QWEN2_VL = {
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
    "vision_depth": 32,
    "vision_embed_dim": 1280,
    "vision_num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
}
_2B = BackboneShape(
    **_QWEN2_VL,
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
_7B = BackboneShape(
    **_QWEN2_VL,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
PUBLISHED = {
    f"Qwen/Qwen2-VL-{size}{kind}": shape for size, shape in (("2B", _2B), ("7B", _7B)) for kind in ("", "-Instruct")
}
"""Shapes of checkpoints on the hub, by name."""


def shape_of(config: ModelConfig) -> BackboneShape:
    """The backbone's shape, from the configuration, from a folder's ``config.json`` or from ``PUBLISHED``.

    Raises:
        ConfigError: the backbone is neither here nor known.
        CheckpointError: its ``config.json`` is damaged, or of another architecture.
    """
    if config.scratch is not None:
        return config.scratch
    assert config.backbone is not None
    if config.backbone in PUBLISHED:
        return PUBLISHED[config.backbone]
    folder = shipped(config.backbone) or Path(config.backbone)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"the shape of model.backbone={config.backbone!r} is not known here: it is no folder with a config.json "
            f"and none of {', '.join(PUBLISHED)}; download it first and name its folder"
        )
    config_json = backbone_config(folder)
    try:
        return _from_json(config_json)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/config.json does not describe a Qwen2-VL ({type(error).__name__}: {error}); copy the checkpoint "
            "again"
        ) from error


def _from_json(config_json: dict[str, Any]) -> BackboneShape:
    text, vision = config_json.get("text_config", config_json), config_json["vision_config"]
    names = BackboneShape.model_fields.keys() & text.keys() - {"tie_word_embeddings", "patch_size"}
    return BackboneShape(
        **{name: text[name] for name in names},
        vision_depth=vision["depth"],
        vision_embed_dim=vision["embed_dim"],
        vision_num_heads=vision["num_heads"],
        patch_size=vision["patch_size"],
        spatial_merge_size=vision["spatial_merge_size"],
        tie_word_embeddings=config_json.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
    )


def image_patches(width: int, height: int, bounds: ImageConfig, shape: BackboneShape) -> int:
    """Patches of an image after Qwen2-VL's own resize."""
    factor = shape.patch_size * shape.spatial_merge_size
    down, across = smart_resize(height, width, factor, bounds.min_pixels, bounds.max_pixels)
    return down * across // shape.patch_size**2


def meta_model(config: ModelConfig) -> Any:
    """The backbone of a run on the meta device, with the adapters and the dtypes that training gives it."""
    shape = shape_of(config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about adapters on tied embeddings, as in training
        backbone = Qwen2VLForConditionalGeneration(
            config_from_shape(shape, {name: number for number, name in enumerate(SPECIAL_TOKENS)})
        )
        # only the number of the chorus rows matters here, not their ids
        chorus_ids = list(range(shape.vocab_size - config.chorus_tokens, shape.vocab_size))
        frozen = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
        if config.lora is None:
            return backbone
        return adapt(backbone.to(frozen), chorus_ids, config).get_base_model()
