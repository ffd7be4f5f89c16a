"""A backbone as published: our pixel bounds hold everywhere, and an exported checkpoint has all of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import crem
from crem.checkpoint import save_model
from crem.config import ImageConfig, load_config
from crem.data.items import Item
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
    _, height, width = collator.sequence(Item(images=[Image.new("RGB", size, (10, 20, 30))])).grids[0]
    return height * width // 4


@pytest.mark.parametrize(
    "stored",
    [
        PUBLISHED_PIXELS,
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, **PUBLISHED_PIXELS},
        {"size": PUBLISHED_PIXELS, **PUBLISHED_PIXELS},
    ],
)
def test_configured_bounds_win_over_every_way_to_store_them(backbone: Path, tmp_path: Path, stored: dict) -> None:  # type: ignore[type-arg]
    saved = json.loads((backbone / "preprocessor_config.json").read_text())
    kept = {k: v for k, v in saved.items() if k not in PUBLISHED_PIXELS}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept | stored))
    processor = image_processor(None, tmp_path, ImageConfig(min_pixels=4096, max_pixels=50176))
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (4096, 50176)


def test_bounds_are_the_same_in_training_inference_and_for_the_plain_processor(backbone: Path, tmp_path: Path) -> None:
    config = load_config("2b", [f"model.backbone={backbone}"]).model
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
    (backbone / "pytorch_model.bin").write_bytes(b"weights of another format")
    (backbone / "modeling.py").write_text("raise SystemExit")
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
    assert original - weights - {"pytorch_model.bin", "modeling.py"} <= exported
    assert exported.isdisjoint({"pytorch_model.bin", "modeling.py", *weights})
    before, after = (GenerationConfig.from_pretrained(folder) for folder in (backbone, tmp_path))
    assert after.eos_token_id == before.eos_token_id and len(before.eos_token_id) == 2
    assert after.pad_token_id == before.pad_token_id
    assert {name: getattr(after, name) for name in GENERATION} == GENERATION
    assert (tmp_path / "LICENSE").read_text() == (backbone / "LICENSE").read_text()
    plain, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and plain.generation_config.top_k == 1
