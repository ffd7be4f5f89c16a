"""A grafted language model answers text as before, and trains as a backbone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLForConditionalGeneration,
)

from crem.cli import main
from crem.config import GraftConfig, load_config
from crem.data.items import Item, TrainingExample
from crem.errors import CheckpointError
from crem.model.backbone import tokenizer_from_texts
from crem.model.build import build_model
from crem.model.graft import graft
from crem.train.step import train_step
from tests.bench.steps import Accumulating
from tests.conftest import TEXTS, lively

VISION = {"vision_depth": 2, "vision_embed_dim": 32, "vision_num_heads": 4, "patch_size": 8}
TEXT = "what is a green square and a red apple? describe animals"


def llama(folder: Path, **changed: object) -> str:
    tokenizer = tokenizer_from_texts(TEXTS, 400)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changed}))  # type: ignore[arg-type]
    lively(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def difference(language: str, grafted: Path, **read: str) -> float:
    """Of the logits of a text, over the vocabulary that both have."""
    folder = str(Path(language).parent) if read else language
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **read).eval()
    after = Qwen2VLForConditionalGeneration.from_pretrained(grafted).eval()
    ids = AutoTokenizer.from_pretrained(grafted)(TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, AutoTokenizer.from_pretrained(folder, **read)(TEXT, return_tensors="pt").input_ids)
    wanted = before(ids).logits
    assert float(wanted.std()) > 0.1, "there is something to compare"
    return float((after(input_ids=ids).logits[..., : wanted.shape[-1]] - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_text_is_answered_as_before(tied: bool, tmp_path: Path) -> None:
    source = llama(tmp_path / "llama", tie_word_embeddings=tied)
    made = graft(source, tmp_path / "grafted", GraftConfig(**VISION))
    assert difference(source, tmp_path / "grafted") < 1e-5
    assert json.loads((tmp_path / "grafted" / "config.json").read_text())["model_type"] == "qwen2_vl"
    grafted = Qwen2VLForConditionalGeneration.from_pretrained(made.out)
    assert made.language_parameters + made.vision_parameters == grafted.num_parameters()


def test_a_graft_trains(tmp_path: Path) -> None:
    settings = [f"{name}={value}" for name, value in VISION.items()]
    command = ["graft", llama(tmp_path / "llama"), "--out", str(tmp_path / "grafted")]
    assert main([*command, *(f"graft.{setting}" for setting in settings)]) == 0
    backbone = f"model.backbone={tmp_path / 'grafted'}"
    config = load_config("small", [backbone, "model.image={min_pixels: 1024, max_pixels: 4096}"])
    model, collator = build_model(config.model)
    rows = [
        TrainingExample(Item(None, [Image.new("RGB", (64, 64), c)]), Item(c), (), "what?", c, z=True)
        for c in ("red", "green")
    ]
    engine = Accumulating(model.train())
    result = train_step(engine, [collator.examples(rows)], config.loss)
    assert result.loss > 0 and result.answer_tokens > 2
    assert all(
        float(p.grad.abs().max()) > 0
        for n, p in model.named_parameters()
        if "visual.blocks" in n and p.grad is not None
    )


def test_what_cannot_be_grafted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention_bias=True"):
        graft(llama(tmp_path / "biased", attention_bias=True), tmp_path / "out", GraftConfig())
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        graft(str(tmp_path / "nothing"), tmp_path / "out", GraftConfig())


@pytest.mark.slow
@pytest.mark.skipif("CREM_GGUF" not in os.environ, reason="CREM_GGUF names no .gguf file")
def test_a_real_language_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = Path(os.environ["CREM_GGUF"])
    made = graft(str(source), tmp_path / "grafted", GraftConfig())
    assert made.language_parameters > 1e8
    assert difference(str(source), tmp_path / "grafted", gguf_file=source.name) < 1e-4
