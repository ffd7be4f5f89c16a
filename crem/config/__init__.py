"""Typed configuration of every run. Imports neither torch nor Ray, so that ``crem --help`` is immediate."""

from __future__ import annotations

from crem.config.derived_tables import MineConfig, SynthesiseConfig
from crem.config.jobs import (
    AblateConfig,
    EmbedConfig,
    EvaluateConfig,
    GraftConfig,
    ImageAccess,
    IndexConfig,
    LayoutConfig,
    PrepareConfig,
    ServeConfig,
)
from crem.config.loading import load_config
from crem.config.model import BackboneShape, ImageConfig, LoraSettings, ModelConfig, PromptConfig
from crem.config.presets import overlay_names, preset_names
from crem.config.run import RunConfig
from crem.config.section import settings
from crem.config.training import DataConfig, LossConfig, OptimConfig, TrainConfig

__all__ = [
    "AblateConfig",
    "BackboneShape",
    "DataConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "GraftConfig",
    "ImageAccess",
    "ImageConfig",
    "IndexConfig",
    "LayoutConfig",
    "LoraSettings",
    "LossConfig",
    "MineConfig",
    "ModelConfig",
    "OptimConfig",
    "PrepareConfig",
    "PromptConfig",
    "RunConfig",
    "ServeConfig",
    "SynthesiseConfig",
    "TrainConfig",
    "load_config",
    "overlay_names",
    "preset_names",
    "settings",
]
