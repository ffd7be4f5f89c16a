"""Checkpoints: a stock checkpoint of the backbone plus one small file, ``crem.json``.

``save`` writes safetensors, configuration, tokenizer and image processor as transformers does, so the plain class loads
the folder without missing or unexpected keys; ``crem.json`` adds K and the prompt, image and attention settings.
``crem.load`` reads a folder, an fsspec URI (downloaded once into a cache) or a hub name. Only safetensors are read and
no code comes from a checkpoint.

The fingerprint names everything that decides an embedding: weights, tokenizer and processor files, K, prompt, image
bounds, dtype and pooling. It is stamped on every embedding file and index.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from crem.config import ModelConfig
from crem.data.collator import Collator
from crem.errors import CheckpointError, ConfigError
from crem.fetch import local_copy
from crem.model.build import dtype_of, read_backbone, read_config, read_processors
from crem.model.chorus import chorus_token_ids
from crem.model.crem import CremModel
from crem.model.lora import adapt

__all__ = ["CREM_FILE", "check_chorus_tokens", "describe", "fingerprint", "read_model", "save_model"]

logger = logging.getLogger(__name__)

CREM_FILE = "crem.json"
FORMAT = 1
_POOLING = "l2(mean(last-layer chorus states))"
_NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
    ".pkl",
    ".index.json",
    ".py",
    ".pyc",
)
"""Endings of weights, which are written anew, and of code, which is never run."""
_NOT_COPIED_NAMES = (".", CREM_FILE, "optimizer", "scheduler", "trainer_state", "training_args", "rng_state", "latest")
"""Beginnings of the names of hidden files, of our own file, and of what another training run left."""
_COPIED_UP_TO_BYTES = 64 * 2**20
_TEXT_FILES = ("tokenizer.json", "preprocessor_config.json", "config.json")


def save_model(
    model: CremModel, collator: Collator, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None
) -> str:
    """Write the checkpoint; returns its fingerprint. LoRA is merged into a copy, the model in training is untouched.

    Args:
        state_dict: full weights of ``model`` where they are partitioned (ZeRO-3); its own otherwise.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.stock_folder is not None:
        _copy_stock_files(model.stock_folder, folder)
    backbone, weights = _plain(model, state_dict)
    dtype = dtype_of(model.config.dtype)
    weights = {k: v.to("cpu", dtype) for k, v in (weights or backbone.state_dict()).items()}
    if model.core.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    backbone.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    for part in (backbone.config, backbone.config.text_config, backbone.config.vision_config):
        part.dtype = dtype  # save_pretrained wrote the dtype in training
    backbone.config.save_pretrained(folder)
    collator.prompts.tokenizer.save_pretrained(folder)
    collator.processor.save_pretrained(folder)
    config = model.config.model_copy(update={"lora": None, "gradient_checkpointing": False})
    description = {
        "format": FORMAT,
        "chorus_tokens": config.chorus_tokens,
        "pooling": _POOLING,
        "model": config.model_dump(mode="json"),
    }
    (folder / CREM_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return fingerprint(folder, config.dtype)


def _copy_stock_files(source: Path, folder: Path) -> None:
    """What the backbone's publisher put beside the weights; what is saved after it replaces files of the same name."""
    if not source.is_dir():  # a cache that was cleared during a long run; the trained weights matter more
        logger.warning("%s no longer exists: the checkpoint lacks the backbone's other files (LICENSE, …)", source)
        return
    for file in sorted(source.iterdir()):
        left = file.name.startswith(_NOT_COPIED_NAMES) or file.name.lower().endswith(_NOT_COPIED)
        if left or not file.is_file() or file.resolve() == (folder / file.name).resolve():
            continue
        if file.stat().st_size > _COPIED_UP_TO_BYTES:
            logger.warning("%s is not copied to the checkpoint: it is over %d bytes", file, _COPIED_UP_TO_BYTES)
        elif file.name == "processor_config.json":
            content = json.loads(file.read_text(encoding="utf-8"))
            content.pop("image_processor", None)  # it would win over preprocessor_config.json, which has our bounds
            (folder / file.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, folder / file.name)


def _plain(
    model: CremModel, state_dict: dict[str, torch.Tensor] | None
) -> tuple[Qwen2VLForConditionalGeneration, dict[str, torch.Tensor] | None]:
    """The backbone as a plain transformers model, and its weights where they are not its own."""
    prefix = "backbone."
    if state_dict is not None:
        state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items()}
    if not hasattr(model.backbone, "merge_and_unload"):
        return model.core, state_dict
    from copy import deepcopy

    if state_dict is None:
        merged: Any = deepcopy(model.backbone).cpu()
    else:
        # a partitioned model cannot be copied; rebuild its shape without weights and give it the gathered ones
        with torch.device("meta"):
            # through a dict, which leaves our vision attention behind
            config = type(model.core.config).from_dict(model.core.config.to_dict())
            bare = Qwen2VLForConditionalGeneration(config)
        merged = adapt(bare, model.chorus_ids, model.config)
        merged.load_state_dict(state_dict, strict=True, assign=True)
    with warnings.catch_warnings():  # PEFT takes embeddings that were loaded apart for untied ones
        warnings.filterwarnings("ignore", message=".*no longer tied.*")
        plain = merged.merge_and_unload()
    plain.config.tie_word_embeddings = model.core.config.tie_word_embeddings
    plain.generation_config = model.core.generation_config
    return plain, None


def read_model(
    path_or_uri: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    chorus_tokens: int | None = None,
) -> tuple[CremModel, Collator, str]:
    """Read a CREM checkpoint: model in evaluation mode on ``device``, its collator, and its fingerprint.

    Args:
        chorus_tokens: K' of a nested checkpoint, which is part of the fingerprint; K where None.

    Raises:
        CheckpointError: missing, damaged or of another kind. ResourceError: too little memory. ConfigError: the model
            was not trained with so many chorus tokens.
    """
    folder = local_copy(path_or_uri)
    description = _description(folder, str(path_or_uri))
    config = ModelConfig.model_validate(description["model"])
    dtype = dtype or dtype_of(config.dtype)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = read_backbone(folder, dtype)
    tokenizer, processor = read_processors(folder, config)
    try:
        chorus_ids = chorus_token_ids(tokenizer, description["chorus_tokens"])
    except AssertionError as error:
        raise CheckpointError(f"{folder} does not fit its {CREM_FILE} ({error}); copy the checkpoint again") from error
    model = CremModel(backbone, chorus_ids, config, folder).to(device).eval()
    mark = fingerprint(folder, str(dtype).split(".")[1], chorus_tokens)
    return model, Collator(tokenizer, processor, chorus_ids, config), mark


def describe(path_or_uri: str | Path, chorus_tokens: int | None = None) -> dict[str, Any]:
    """What a CREM checkpoint is, without loading its weights: ``fingerprint``, ``dim``, ``chorus_tokens``.

    Raises:
        CheckpointError: missing, damaged or of another kind. ConfigError: not trained with so many chorus tokens.
    """
    folder = local_copy(path_or_uri)
    description = _description(folder, str(path_or_uri))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "fingerprint": fingerprint(folder, description["model"]["dtype"], chorus_tokens),
        "dim": int(config.get("text_config", config)["hidden_size"]),
        "chorus_tokens": description["chorus_tokens"] if chorus_tokens is None else chorus_tokens,
    }


def _description(folder: Path, named: str) -> dict[str, Any]:
    file = folder / CREM_FILE
    if not file.is_file():
        kind = "a folder without config.json"
        if (folder / "config.json").is_file():
            kind = f"a {read_config(folder).get('model_type')!r} checkpoint"
        raise CheckpointError(
            f"{named!r} is {kind}, not a CREM checkpoint ({CREM_FILE} is missing). Train one from a Qwen2-VL: "
            f"crem train PREPARED --out RUN --preset 2b model.backbone={named}"
        )
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise CheckpointError(
                f"{named!r} has format {description['format']}; this version reads {FORMAT}: install a newer crem"
            )
        ModelConfig.model_validate(description["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy the checkpoint again") from error
    return description


def fingerprint(folder: str | Path, dtype: str, chorus_tokens: int | None = None) -> str:
    """16 hex digits over the contents of the checkpoint folder, K, prompt and image settings, dtype and pooling.

    Not over where the checkpoint lies, nor over where the backbone lay that it was trained from. ``chorus_tokens`` is
    the number in use, K where None.

    Raises:
        ConfigError: the model was not trained with so many chorus tokens.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in [folder / name for name in _TEXT_FILES] + sorted(folder.glob("*.safetensors")):
        if file.is_file():
            with open(file, "rb") as handle:
                digest.update(f"{file.name}:{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    description = json.loads((folder / CREM_FILE).read_text(encoding="utf-8"))
    used = check_chorus_tokens(ModelConfig.model_validate(description["model"]), chorus_tokens)
    description["model"] |= {"backbone": None, "scratch": None}
    settings = [description, dtype, _POOLING] + [used] * (used != description["chorus_tokens"])
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def check_chorus_tokens(config: ModelConfig, chorus_tokens: int | None) -> int:
    """The number of chorus tokens to use: ``chorus_tokens`` where the model was trained for it, K where None.

    Raises:
        ConfigError: it was not.
    """
    if chorus_tokens is None:
        return config.chorus_tokens
    if chorus_tokens not in config.chorus_counts:
        raise ConfigError(
            f"this model works with {', '.join(map(str, config.chorus_counts))} chorus tokens, not with "
            f"{chorus_tokens}; other counts are trained with model.nested_chorus"
        )
    return chorus_tokens
