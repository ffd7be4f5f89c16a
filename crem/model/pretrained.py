"""Reading a pretrained Qwen2-VL: its ``config.json``, weights, tokenizer and image processor.

Only safetensors are read and no code comes from a checkpoint. Whatever does not fit is refused with the remedy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from crem.config import ModelConfig
from crem.errors import CheckpointError, ResourceError
from crem.host_memory import available_bytes
from crem.model.backbone import SPECIAL_TOKENS, image_processor

__all__ = ["backbone_config", "dtype_of", "read_backbone", "read_config", "read_processors"]


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint's folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read ({error}); copy the checkpoint again") from error
    return config


def backbone_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a backbone's folder.

    Raises:
        CheckpointError: unreadable, or of another architecture than Qwen2-VL.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind != "qwen2_vl":
        named = "".join(f" ({name})" for name in config.get("architectures") or ())
        raise CheckpointError(
            f"{folder} holds a {kind!r} model{named}; CREM's backbone is Qwen2-VL (model_type 'qwen2_vl', "
            "Qwen2VLForConditionalGeneration): set model.backbone to one"
        )
    return config


def read_backbone(folder: Path, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    """The plain transformers model in a folder, its weights in ``dtype``.

    Raises:
        CheckpointError: another architecture, an adapter, or weights that do not fit. ResourceError: too little memory.
    """
    backbone_config(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would put the adapter into the model
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json); merge it into the weights (PEFT's merge_and_unload) and "
            "give the folder of the merged model"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors; other weight formats are not read, convert it first")
    try:
        need, free = _count_weights(files) * dtype.itemsize, available_bytes()
        if need > free:
            raise ResourceError(
                f"the weights in {folder} take {need / 2**30:.1f} GiB in {dtype} and {free / 2**30:.1f} GiB of memory "
                "are free; use a machine or container with more memory, or a smaller checkpoint"
            )
        model, info = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except ResourceError:
        raise
    except Exception as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {type(error).__name__}: {error}") from error
    wrong = {k: sorted(info[k])[:3] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if wrong:
        raise CheckpointError(f"the weights in {folder} do not fit its config.json: {wrong}; copy the checkpoint again")
    return model  # type: ignore[no-any-return]


def _count_weights(files: list[Path]) -> int:
    count = 0
    for file in files:
        with safe_open(file, "pt") as weights:  # reads the header alone
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


def read_processors(folder: Path, config: ModelConfig) -> tuple[Any, Any]:
    """Tokenizer and image processor of a backbone's or CREM's checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = image_processor(None, folder, config.image)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer or image processor in {folder} cannot be read ({type(error).__name__}: {error}); copy the "
            "checkpoint again"
        ) from error
    # without tokenizer.json transformers returns an empty tokenizer and raises nothing
    if missing := set(SPECIAL_TOKENS) - set(tokenizer.get_vocab()):
        raise CheckpointError(
            f"the tokenizer in {folder} lacks Qwen2-VL's {', '.join(sorted(missing))}; copy the checkpoint again"
        )
    return tokenizer, processor


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a name in the configuration."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
