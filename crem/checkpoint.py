"""Checkpoints: a stock checkpoint of the backbone plus one small file, ``crem.json``.

``save_model`` writes safetensors, configuration, tokenizer and image processor as transformers does, so the plain class
loads the folder without missing or unexpected keys; ``crem.json`` adds K and the prompt, image and attention settings.
``crem.load`` reads a folder, an fsspec URI (downloaded once into a cache) or a hub name. Only safetensors are read and
no code comes from a checkpoint.

The fingerprint covers everything that an embedding depends on: weights, tokenizer and processor files, K, prompt, image
bounds, dtype and pooling. It is stamped on every embedding file and index.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crem.config import ModelConfig
from crem.data.collator import Collator
from crem.errors import CheckpointError, ConfigError
from crem.fetch import local_copy
from crem.model.chorus import chorus_token_ids
from crem.model.crem import CremModel
from crem.model.lora import merged
from crem.model.memory import MemoryLayout, MemoryType
from crem.model.pretrained import dtype_of, read_backbone, read_config, read_processors

__all__ = [
    "CREM_FILE",
    "CheckpointInfo",
    "LoadedModel",
    "check_chorus_tokens",
    "describe",
    "fingerprint",
    "read_collator",
    "read_model",
    "save_model",
]

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
"""Suffixes of weights, which are written again, and of code, which is never run."""
_NOT_COPIED_NAMES = (".", CREM_FILE, "optimizer", "scheduler", "trainer_state", "training_args", "rng_state", "latest")
"""Prefixes of hidden files, of our own file, and of files that another training run left."""
_COPIED_UP_TO_BYTES = 64 * 2**20
_TEXT_FILES = ("tokenizer.json", "preprocessor_config.json", "config.json")


def save_model(
    model: CremModel, collator: Collator, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None
) -> str:
    """Write the checkpoint; returns its fingerprint. LoRA is merged into a copy; ``model`` stays as it is.

    Args:
        state_dict: full weights of ``model`` where they are partitioned (ZeRO-3); its own otherwise.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.stock_folder is not None:
        _copy_stock_files(model.stock_folder, folder)
    backbone, weights = merged(model, state_dict)
    dtype = dtype_of(model.config.dtype)
    weights = {k: v.to("cpu", dtype) for k, v in (weights or backbone.state_dict()).items()}
    if model.core.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    backbone.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    for part in (backbone.config, backbone.config.text_config, backbone.config.vision_config):
        part.dtype = dtype  # save_pretrained wrote the dtype of training
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
    """Copy the publisher's other files (LICENSE, …); files of the same name saved afterwards replace them."""
    if not source.is_dir():  # a cache cleared during a long run, which must not cost the trained weights
        logger.warning("%s no longer exists: the checkpoint lacks the backbone's other files (LICENSE, …)", source)
        return
    for file in sorted(source.iterdir()):
        skipped = file.name.startswith(_NOT_COPIED_NAMES) or file.name.lower().endswith(_NOT_COPIED)
        if skipped or not file.is_file() or file.resolve() == (folder / file.name).resolve():
            continue
        if file.stat().st_size > _COPIED_UP_TO_BYTES:
            logger.warning("%s is not copied to the checkpoint: it is over %d bytes", file, _COPIED_UP_TO_BYTES)
        elif file.name == "processor_config.json":
            content = json.loads(file.read_text(encoding="utf-8"))
            content.pop("image_processor", None)  # it would override preprocessor_config.json, which has our bounds
            (folder / file.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, folder / file.name)


class LoadedModel(NamedTuple):
    """A checkpoint in memory."""

    model: CremModel
    """in evaluation mode"""
    collator: Collator
    fingerprint: str


def read_model(
    path_or_uri: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    chorus_tokens: int | None = None,
) -> LoadedModel:
    """Read a CREM checkpoint onto ``device``.

    Args:
        chorus_tokens: K' of a nested checkpoint, which is part of the fingerprint; K where None.

    Raises:
        CheckpointError: missing, damaged or of another kind. ResourceError: too little memory. ConfigError: the model
            was not trained with that many chorus tokens.
    """
    folder = local_copy(path_or_uri)
    collator, config, chorus_ids = _read_collator(folder, str(path_or_uri))
    dtype = dtype or dtype_of(config.dtype)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = read_backbone(folder, dtype)
    model = CremModel(backbone, chorus_ids, config, folder).to(device).eval()
    stamp = fingerprint(folder, str(dtype).split(".")[1], chorus_tokens)
    return LoadedModel(model, collator, stamp)


def read_collator(path_or_uri: str | Path) -> Collator:
    """What prepares items for a CREM checkpoint: its tokenizer, image processor and prompts, without the weights.

    Raises:
        CheckpointError: missing, damaged or of another kind.
    """
    return _read_collator(local_copy(path_or_uri), str(path_or_uri))[0]


def _read_collator(folder: Path, named: str) -> tuple[Collator, ModelConfig, list[int]]:
    description = _description(folder, named)
    config = ModelConfig.model_validate(description["model"])
    tokenizer, processor = read_processors(folder, config)
    try:
        chorus_ids = chorus_token_ids(tokenizer, description["chorus_tokens"])
    except AssertionError as error:
        raise CheckpointError(f"{folder} does not fit its {CREM_FILE} ({error}); copy the checkpoint again") from error
    return Collator(tokenizer, processor, chorus_ids, config), config, chorus_ids


@dataclass(frozen=True)
class CheckpointInfo:
    """A CREM checkpoint without its weights."""

    fingerprint: str
    dim: int
    """length of an embedding"""
    chorus_tokens: int
    """number in use: K, or K' of a nested checkpoint"""
    max_pixels: int
    """larger images are reduced to this area before the model reads them"""
    max_text_tokens: int
    """longer texts are cut"""
    layers: int
    kv_heads: int
    head_dim: int

    def memory(self, dtype: MemoryType) -> MemoryLayout:
        """The layout of its memories."""
        return MemoryLayout(self.fingerprint, self.layers, self.kv_heads, self.chorus_tokens, self.head_dim, dtype)


def describe(path_or_uri: str | Path, chorus_tokens: int | None = None) -> CheckpointInfo:
    """Read what a CREM checkpoint is, without loading its weights.

    Raises:
        CheckpointError: missing, damaged or of another kind. ConfigError: not trained with that many chorus tokens.
    """
    folder = local_copy(path_or_uri)
    description = _description(folder, str(path_or_uri))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    language = config.get("text_config", config)
    model = ModelConfig.model_validate(description["model"])
    return CheckpointInfo(
        fingerprint=fingerprint(folder, description["model"]["dtype"], chorus_tokens),
        dim=int(language["hidden_size"]),
        chorus_tokens=description["chorus_tokens"] if chorus_tokens is None else chorus_tokens,
        max_pixels=model.image.max_pixels,
        max_text_tokens=model.prompt.max_text_tokens,
        layers=int(language["num_hidden_layers"]),
        kv_heads=int(language["num_key_value_heads"]),
        head_dim=int(language.get("head_dim") or language["hidden_size"] // language["num_attention_heads"]),
    )


def _description(folder: Path, named: str) -> dict[str, Any]:
    """The checked content of ``crem.json``, as written: the fingerprint is taken over it."""
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

    The paths of the checkpoint and of its backbone do not matter. ``chorus_tokens`` is the number in use, K where None.

    Raises:
        ConfigError: the model was not trained with that many chorus tokens.
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
