"""The complete configuration of a run: one frozen tree."""

from __future__ import annotations

import yaml

from crem.config.derived_tables import MineConfig, SynthesiseConfig
from crem.config.jobs import (
    AblateConfig,
    EmbedConfig,
    EvaluateConfig,
    GraftConfig,
    IndexConfig,
    PrepareConfig,
    ServeConfig,
)
from crem.config.model import ModelConfig
from crem.config.section import Section
from crem.config.training import DataConfig, LossConfig, OptimConfig, TrainConfig

__all__ = ["RunConfig"]


class RunConfig(Section):
    """Everything that describes a run."""

    preset: str = "2b"
    model: ModelConfig = ModelConfig()
    graft: GraftConfig = GraftConfig()
    prepare: PrepareConfig = PrepareConfig()
    synthesise: SynthesiseConfig = SynthesiseConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    embed: EmbedConfig = EmbedConfig()
    index: IndexConfig = IndexConfig()
    mine: MineConfig = MineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ablate: AblateConfig = AblateConfig()
    serve: ServeConfig = ServeConfig()

    def to_yaml(self) -> str:
        """The complete configuration as YAML; ``load_config`` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
