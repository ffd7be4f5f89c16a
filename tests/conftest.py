"""Fixtures shared by all tests: a tiny real CREM checkpoint of two layers."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from crem.config import ModelConfig, load_config

pytest_plugins = ["tests.s3_server"]

TINY = [
    "model.scratch={vocab_size: 512, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, vision_depth: 2, vision_embed_dim: 32, vision_num_heads: 4}",
    "model.backbone=null",
    "model.chorus_tokens=4",
    "model.nested_chorus=[]",
    "train.precision=float32",
]
TEXTS = ["a red apple", "what is this? a green square", "animals and nature", "food and drink", "describe it"] * 4


def tiny_config(*overrides: str) -> ModelConfig:
    """The two-layer model's configuration."""
    return load_config("micro", [*TINY, *overrides]).model


@torch.no_grad()
def lively(model: torch.nn.Module, seed: int = 1) -> None:
    """Spread the weights, so that outputs of a random model differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a saved two-layer CREM checkpoint with lively random weights."""
    from crem.checkpoint import save_model
    from crem.model.build import build_model

    model, collator = build_model(tiny_config(), texts=TEXTS)
    lively(model)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(model, collator, folder)
    return str(folder)
