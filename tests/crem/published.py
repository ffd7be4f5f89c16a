"""A backbone's folder as its publisher writes it, at tiny width.

Source: the files of Qwen/Qwen2-VL-2B-Instruct on the Hugging Face hub. Unlike what transformers 5 saves: a flat
``config.json`` with ``rope_scaling``, weights in shards with an index, image bounds at the top level of
``preprocessor_config.json``, the chat template inside of ``tokenizer_config.json`` and in ``chat_template.json``, the
vocabulary once more in ``vocab.json`` and ``merges.txt``, and a ``generation_config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.crem.train.runs import stock_backbone

GENERATION = {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01, "repetition_penalty": 1.0}
"""Sampling settings of the publisher's ``generation_config.json``."""
PUBLISHED_PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}


def published_backbone(folder: Path, **shape: Any) -> Path:
    """Write the folder; its images have 14-pixel patches as the published ones."""
    stock_backbone(folder, patch_size=14, **shape)
    _config(folder)
    _weights(folder)
    processor = _read(folder, "preprocessor_config.json")
    processor.pop("size")
    _write(folder, "preprocessor_config.json", processor | PUBLISHED_PIXELS)
    ids = {k: v for k, v in _read(folder, "generation_config.json").items() if k.endswith("_token_id")}
    _write(folder, "generation_config.json", ids | GENERATION | {"transformers_version": "4.37.0"})
    tokenizer = _read(folder, "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    _write(folder, "tokenizer_config.json", tokenizer | {"chat_template": template.read_text()})
    _write(folder, "chat_template.json", {"chat_template": template.read_text()})
    bpe = _read(folder, "tokenizer.json")["model"]
    _write(folder, "vocab.json", bpe["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in bpe["merges"]))
    template.unlink()
    (folder / "LICENSE").write_text("Apache License\n")
    (folder / "README.md").write_text("# Tiny-Qwen2-VL\n")
    return folder


def _config(folder: Path) -> None:
    saved = _read(folder, "config.json")
    text, vision = saved.pop("text_config"), saved.pop("vision_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    for name in ("layer_types", "model_type", "pad_token_id"):
        text.pop(name, None)
    vision = {k: v for k, v in vision.items() if k not in ("rope_parameters", "model_type")}
    flat = saved | text | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    flat.pop("dtype", None)
    _write(folder, "config.json", flat | {"transformers_version": "4.41.2", "vision_config": vision})


def _weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / file, {"format": "pt"})
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {name: file for file, held in shards.items() for name in held}
    _write(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors").unlink()


def _read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, indent=2))
