"""Configuration: presets load, bounds hold, unknown keys name the nearest known one."""

from __future__ import annotations

import pytest

from crem.config import RunConfig, load_config, preset_names
from crem.errors import ConfigError


def test_presets_are_these_and_round_trip(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert preset_names() == ["2b", "7b", "micro", "micro-base", "micro-demo"]
    for name in preset_names():
        config = load_config(name)
        assert config.preset == name
        (tmp_path / "c.yaml").write_text(config.to_yaml())
        assert load_config(tmp_path / "c.yaml") == config


def test_2b_is_the_papers_setting() -> None:
    c = load_config("2b")
    assert (c.model.chorus_tokens, c.train.global_batch, c.optim.lr, c.loss.temperature) == (16, 1024, 5e-5, 0.02)
    assert c.model.lora is not None and (c.model.lora.r, c.model.lora.alpha) == (16, 64)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.stepz=3", "train.steps"),
        ("model.promt.system=x", "model.prompt"),
        ("model.lora.rank=3", "r"),
        ("losses.temperature=1", "loss"),
    ],
)
def test_unknown_keys_name_the_nearest(override: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as error:
        load_config("2b", [override])
    assert "unknown key" in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loss.temperature=-1", "loss.temperature"),
        ("train.global_batch=7", "multiple of train.workers"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("train.steps", "section.key=value"),
        ("model.scratch={}", "exactly one"),
    ],
)
def test_bad_values_name_the_key(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config("2b", [override])


def test_numbers_as_people_write_them() -> None:
    assert load_config("2b", ["optim.lr=5e-4"]).optim.lr == 5e-4
    assert load_config("2b", ["model.lora=null"]).model.lora is None


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'micro'"):
        load_config("mikro")


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.steps = 3  # type: ignore[misc]
