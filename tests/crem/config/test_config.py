"""Configuration: presets load, bounds hold, unknown keys name the nearest known one."""

from __future__ import annotations

from pathlib import Path

import pytest

from crem.config import RunConfig, load_config, overlay_names, preset_names
from crem.errors import ConfigError

COMPOSED = [
    *("2b+full", "2b+full+offload", "2b+64gpu", "2b+full+64gpu"),
    *("7b+full", "7b+full+offload-all", "7b+64gpu", "7b+full+64gpu", "micro+demo"),
]


def test_presets_are_complete_and_round_trip(tmp_path: Path) -> None:
    assert preset_names() == ["2b", "7b", "micro", "micro-base", "small", "small-base"]
    assert overlay_names() == ["64gpu", "demo", "full", "offload", "offload-all"]
    for name in [*preset_names(), *COMPOSED]:
        config = load_config(name)
        assert config.preset == name
        (tmp_path / "c.yaml").write_text(config.to_yaml())
        assert load_config(tmp_path / "c.yaml") == config


def test_presets_cover_adapters_stages_offload_and_sizes() -> None:
    """{LoRA, full} x {ZeRO 2, 3} x {with, without offload} x {8, 64 GPUs}, where the combination has a use."""
    covered = set()
    for name in ["2b", "7b", *COMPOSED]:
        c = load_config(name)
        if c.model.backbone is not None and c.model.backbone.startswith("Qwen/"):
            covered.add((c.model.lora is None, c.train.zero_stage, c.train.offload, c.train.workers))
            assert c.train.chunk_rows and c.train.global_batch == 1024
    lora, full = False, True
    assert covered >= {(lora, stage, "none", n) for stage in (2, 3) for n in (8, 64)}
    assert covered >= {(full, stage, "none", n) for stage in (2, 3) for n in (8, 64)}
    assert covered >= {(full, 2, "optimizer", 8), (full, 3, "all", 8)}


def test_overlays_apply_from_left_to_right(tmp_path: Path) -> None:
    base, full = load_config("7b"), load_config("7b+full+offload-all")
    assert (full.model.lora, full.optim.lr, full.train.offload, full.train.chunk_rows) == (None, 1e-5, "all", 4)
    assert full.train.zero_stage == base.train.zero_stage and full.model.image == base.model.image
    assert load_config("7b+offload-all+full").train.chunk_rows == 8, "the later overlay wins"
    mine = tmp_path / "mine.yaml"
    mine.write_text("train: {steps: 9}\n")
    assert load_config(f"2b+{mine}").train.steps == 9
    assert load_config(f"2b+{mine}").preset == f"2b+{mine}"
    mine.write_text(load_config("2b").to_yaml())
    assert load_config(f"{mine}+64gpu") == load_config("2b+64gpu")


def test_a_base_is_laid_below(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: 2b\npreset: a\nmodel: {lora: null}\noptim: {lr: 1.0e-6}\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path}/a.yaml\npreset: b\ntrain: {{workers: 4}}\n")
    c, below = load_config(tmp_path / "b.yaml", ["loss.temperature=0.1"]), load_config("2b")
    assert (c.preset, c.model.lora, c.optim.lr, c.train.workers, c.loss.temperature) == ("b", None, 1e-6, 4, 0.1)
    assert c.data == below.data and c.model.image == below.model.image
    assert c.optim.warmup_steps == below.optim.warmup_steps, "beside what is replaced, a section stays"


def test_a_wrong_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: 2b-ful\n")
    with pytest.raises(ConfigError, match=r"base of .*a\.yaml': unknown preset '2b-ful'; did you mean '2b\+full'"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path}/a.yaml\n")
    with pytest.raises(ConfigError, match="is its own base"):
        load_config(tmp_path / "a.yaml")


def test_a_key_given_twice_is_refused_with_file_line_and_key(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("base: 2b\ntrain:\n  steps: 3\n  workers: 8\n  steps: 4\n")
    with pytest.raises(ConfigError, match=r"a\.yaml, line 5: key 'steps' is given twice, first in line 3"):
        load_config(file)
    file.write_text("train: {steps: 3}\nloss: {symmetric: true}\ntrain: {workers: 8}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml, line 3: key 'train' is given twice, first in line 1"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"override 'model\.lora=.*key 'r'"):
        load_config("2b", ["model.lora={r: 8, r: 16}"])


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
        ("train.min_workers=9", "train.min_workers=9 is above train.workers=8"),
        ("train.min_workers=3", r"multiple of train.workers=7 \(every number of workers from train.min_workers=3\)"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("train.offload=all", "train.zero_stage=3 or more; it is 2"),
        ("train.offload=disk", "train.offload"),
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


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("mikro", "unknown preset 'mikro'; did you mean 'micro'"),
        ("2b+ful", r"unknown preset '2b\+ful'; did you mean '2b\+full'"),
        ("2b-full-64gpu", r"did you mean '2b\+full\+64gpu'"),
        ("micro-demo", r"did you mean 'micro\+demo'"),
        ("full", r"did you mean '..\+full'"),
        ("2b+micro", r"Known: 2b, .* each with any of \+64gpu"),
        ("nowhere/run.yaml", "there is no file 'nowhere/run.yaml'"),
        ("2b+run.yaml", "there is no file 'run.yaml'"),
    ],
)
def test_an_unknown_preset_names_the_nearest(preset: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(preset)


def test_off_is_a_word() -> None:
    overrides = ["prepare.exact_duplicates=off", 'prepare.near_duplicates="drop"']
    prepare = load_config("micro", overrides).prepare
    assert (prepare.exact_duplicates, prepare.near_duplicates) == ("off", "drop")


def test_the_last_of_several_overrides_wins() -> None:
    assert load_config("2b", ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.steps = 3  # type: ignore[misc]
