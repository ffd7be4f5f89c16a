"""A backbone as published: our pixel bounds hold everywhere, and an exported checkpoint has all of its files."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from pathlib import Path

import fsspec
import huggingface_hub
import pytest
from PIL import Image
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import crem
from crem.checkpoint import save_model
from crem.config import ImageConfig, load_config
from crem.data.items import Item
from crem.errors import CheckpointError
from crem.model.backbone import image_processor
from crem.model.build import build_collator, build_model
from crem.train.export import export
from tests.crem.published import GENERATION, PUBLISHED_PIXELS, published_backbone
from tests.crem.train.runs import PlainEngine

VISION_TOKENS = {(2000, 1500): 1230, (1200, 1000): 1248, (30, 30): 4}
"""Merged patches of 28 x 28 pixels under 4 and 1280 x 28 x 28 pixels, by Qwen2-VL's resize."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_backbone(tmp_path_factory.mktemp("published") / "backbone")


def vision_tokens(collator, size: tuple[int, int]) -> int:  # type: ignore[no-untyped-def]
    _, height, width = collator.prepare(Item(images=[Image.new("RGB", size, (10, 20, 30))])).grids[0]
    return height * width // 4


@pytest.mark.parametrize(
    "stored",
    [
        PUBLISHED_PIXELS,
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, **PUBLISHED_PIXELS},
        {**PUBLISHED_PIXELS, "size": {"longest_edge": 12845056, "shortest_edge": 3136}},
        {"size": PUBLISHED_PIXELS, **PUBLISHED_PIXELS},
        {"do_resize": False, **PUBLISHED_PIXELS},
    ],
)
def test_configured_bounds_win_over_every_way_to_store_them(backbone: Path, tmp_path: Path, stored: dict) -> None:  # type: ignore[type-arg]
    saved = json.loads((backbone / "preprocessor_config.json").read_text())
    kept = {k: v for k, v in saved.items() if k not in PUBLISHED_PIXELS}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept | stored))
    processor = image_processor(None, tmp_path, ImageConfig(min_pixels=4096, max_pixels=50176))
    _, height, width = processor(images=[Image.new("RGB", (400, 300))], return_tensors="np")["image_grid_thw"][0]
    assert (height, width) == (12, 18), "168 x 252 pixels, under 50,176"
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (4096, 50176)


@pytest.mark.parametrize("nested", [False, True], ids=["as published", "and in processor_config.json"])
def test_bounds_are_the_same_in_training_inference_and_for_the_plain_processor(
    backbone: Path, tmp_path: Path, nested: bool
) -> None:
    source = Path(shutil.copytree(backbone, tmp_path / "backbone"))
    if nested:  # as AutoProcessor of transformers 5 saves it; there it wins over preprocessor_config.json
        image = json.loads((source / "preprocessor_config.json").read_text())
        content = {"image_processor": image, "processor_class": "Qwen2VLProcessor"}
        (source / "processor_config.json").write_text(json.dumps(content))
    config = load_config("2b", [f"model.backbone={source}"]).model
    model, collator = build_model(config)
    assert {size: vision_tokens(collator, size) for size in VISION_TOKENS} == VISION_TOKENS
    assert {size: vision_tokens(build_collator(config), size) for size in VISION_TOKENS} == VISION_TOKENS
    save_model(model, collator, tmp_path / "model")
    loaded = crem.load(tmp_path / "model")
    assert {size: vision_tokens(loaded.collator, size) for size in VISION_TOKENS} == VISION_TOKENS
    plain = Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path / "model"))
    grid = plain(images=[Image.new("RGB", (2000, 1500))], return_tensors="np")["image_grid_thw"][0]
    assert grid[1] * grid[2] // 4 == VISION_TOKENS[2000, 1500]


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("gathered", [True, False], ids=["as training exports", "own weights"])
def test_an_export_has_every_file_of_the_backbone(backbone: Path, tmp_path: Path, lora: bool, gathered: bool) -> None:
    left = {"pytorch_model.bin", "modeling.py", "optimizer.pt", "trainer_state.json", "latest", ".gitattributes"}
    for name in left:
        (backbone / name).write_text("not to be copied")
    (backbone / "global_step1").mkdir(exist_ok=True)
    run = load_config("2b", [f"model.backbone={backbone}", *([] if lora else ["model.lora=null"])])
    model, collator = build_model(run.model)
    if gathered:
        engine = PlainEngine(model, run)
        engine.module = model  # type: ignore[attr-defined]
        export(engine, collator, tmp_path)
    else:
        save_model(model, collator, tmp_path)
    original, exported = ({path.name for path in folder.iterdir()} for folder in (backbone, tmp_path))
    weights = {name for name in original if "safetensors" in name}
    assert original - weights - left - {"global_step1"} <= exported
    assert exported.isdisjoint({"global_step1", *left, *weights})
    before, after = (GenerationConfig.from_pretrained(folder) for folder in (backbone, tmp_path))
    assert after.eos_token_id == before.eos_token_id and len(before.eos_token_id) == 2
    assert after.pad_token_id == before.pad_token_id
    assert {name: getattr(after, name) for name in GENERATION} == GENERATION
    assert (tmp_path / "LICENSE").read_text() == (backbone / "LICENSE").read_text()
    plain, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and plain.generation_config.top_k == 1


@pytest.mark.parametrize("source", ["memory://published/backbone", "publisher/backbone"], ids=["URI", "hub"])
def test_a_downloaded_backbone_has_its_files_in_the_export(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def snapshot(name: str, allow_patterns: list[str]) -> str:
        links = tmp_path / "snapshot"  # the hub's cache holds links to files named by their hashes
        links.mkdir()
        for file in backbone.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                (links / file.name).symlink_to(file)
        return str(links)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.filesystem("memory").put(f"{backbone}/", "/published/backbone/", recursive=True)
    model, collator = build_model(load_config("2b", [f"model.backbone={source}"]).model)
    save_model(model, collator, tmp_path / "model")
    names = ("LICENSE", "README.md", "chat_template.json", "vocab.json", "merges.txt")
    assert all((tmp_path / "model" / name).read_text() == (backbone / name).read_text() for name in names)
    assert not any((tmp_path / "model" / name).is_symlink() for name in names)


def test_a_cleared_cache_does_not_cost_the_trained_model(
    backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(backbone, tmp_path / "backbone")
    model, collator = build_model(load_config("2b", [f"model.backbone={source}"]).model)
    shutil.rmtree(source)
    with caplog.at_level(logging.WARNING, logger="crem"):
        save_model(model, collator, tmp_path / "model")
    assert "backbone no longer exists" in caplog.text
    assert crem.load(tmp_path / "model").model.core.generation_config.top_k == 1


def test_a_backbone_with_an_adapter_is_refused(backbone: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(backbone, tmp_path / "backbone"))
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it into the weights"):
        build_model(load_config("2b", [f"model.backbone={source}"]).model)
