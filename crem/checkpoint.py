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
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from crem.config import ModelConfig
from crem.data.collator import Collator
from crem.errors import CheckpointError, ConfigError, ResourceError
from crem.fetch import local_copy
from crem.memory import available_bytes
from crem.model.backbone import CHAT_TEMPLATE, SPECIAL_TOKENS, image_processor, model_from_shape, tokenizer_from_texts
from crem.model.chorus import add_chorus_tokens, chorus_token_ids, initialise_rows
from crem.model.crem import CremModel

__all__ = [
    "CREM_FILE",
    "adapt",
    "build_collator",
    "build_model",
    "check_chorus_tokens",
    "describe",
    "fingerprint",
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
    ".index.json",
    ".py",
)
"""Endings of weights, which are written anew, and of code, which is never run."""
_COPIED_UP_TO_BYTES = 64 * 2**20
_TEXT_FILES = ("tokenizer.json", "preprocessor_config.json", "config.json")


def build_model(config: ModelConfig, *, texts: list[str] | None = None, seed: int = 0) -> tuple[CremModel, Collator]:
    """A new CREM model: random from ``config.scratch``, or a pretrained backbone with fresh chorus rows and LoRA.

    Args:
        texts: training texts, from which a scratch model's tokenizer is trained.

    Raises:
        ConfigError, CheckpointError, ResourceError: with the remedy.
    """
    if config.scratch is not None:
        if not texts:
            raise ConfigError("a model from scratch trains its tokenizer and needs texts; give the prepared rows")
        # spare rows, as Qwen2-VL's matrix has: chorus tokens can be added to the trained backbone without growing it
        room = config.scratch.vocab_size - max(config.chorus_tokens, config.scratch.vocab_size // 32)
        tokenizer = tokenizer_from_texts(texts, room)
        tokenizer.chat_template = CHAT_TEMPLATE
        chorus_ids = add_chorus_tokens(tokenizer, config.chorus_tokens)
        backbone, stock = model_from_shape(config.scratch, tokenizer, seed), None
        processor = image_processor(config.scratch, None, config.image)
    else:
        assert config.backbone is not None
        folder = local_copy(config.backbone)
        # what is trained is trained in float32; frozen weights stay in the inference dtype
        backbone = _read_backbone(folder, torch.float32 if config.lora is None else _dtype(config.dtype))
        tokenizer, processor = _read_processors(folder, config)
        known = len(tokenizer)
        chorus_ids = add_chorus_tokens(tokenizer, config.chorus_tokens)
        embedding = backbone.get_input_embeddings().weight
        if max(chorus_ids) >= embedding.shape[0]:
            with _seeded(seed):
                backbone.resize_token_embeddings(max(chorus_ids) + 1)
        # a CREM checkpoint taken as backbone brings trained chorus rows, which stay
        initialise_rows(backbone.get_input_embeddings().weight.data, [i for i in chorus_ids if i >= known], seed=seed)
        stock = folder
    with _seeded(seed):
        adapted = backbone if config.lora is None else adapt(backbone, chorus_ids, config)
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        # it makes embeddings ask for gradients, patch embeddings too, which only reentrant checkpoints need: a frozen
        # vision tower would be held, recomputed and gone through backward for nothing. (PEFT, above, would do it too.)
        backbone.disable_input_require_grads()
    return CremModel(adapted, chorus_ids, config, stock), Collator(tokenizer, processor, chorus_ids, config)


def build_collator(config: ModelConfig, *, texts: list[str] | None = None) -> Collator:
    """The collator of ``build_model``, without reading the weights of a pretrained backbone."""
    if config.backbone is None:
        return build_model(config, texts=texts)[1]
    tokenizer, processor = _read_processors(local_copy(config.backbone), config)
    return Collator(tokenizer, processor, add_chorus_tokens(tokenizer, config.chorus_tokens), config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same random weights on every rank, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def adapt(backbone: Qwen2VLForConditionalGeneration, chorus_ids: list[int], config: ModelConfig) -> Any:
    """The backbone with LoRA by PEFT: adapters and chorus rows are trained in float32, all else is frozen."""
    from peft import LoraConfig, get_peft_model

    assert config.lora is not None
    names = "|".join(config.lora.targets)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=rf".*language_model.*\.({names})",
        trainable_token_indices=chorus_ids if config.chorus_tokens else None,  # the new rows are trained in full
    )
    adapted = get_peft_model(backbone, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


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
    dtype = _dtype(model.config.dtype)
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
    for file in sorted(source.iterdir()):
        known = file.name == CREM_FILE or file.name.startswith(".") or file.name.lower().endswith(_NOT_COPIED)
        if known or not file.is_file() or file.resolve() == (folder / file.name).resolve():
            continue
        if file.stat().st_size <= _COPIED_UP_TO_BYTES:
            shutil.copyfile(file, folder / file.name)
        else:
            logger.warning("%s is not copied to the checkpoint: it is over %d bytes", file, _COPIED_UP_TO_BYTES)


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
    dtype = dtype or _dtype(config.dtype)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = _read_backbone(folder, dtype)
    tokenizer, processor = _read_processors(folder, config)
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
            kind = f"a {_read_config(folder).get('model_type')!r} checkpoint"
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


def _read_config(folder: Path) -> dict[str, Any]:
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
    config = _read_config(folder)
    kind = config.get("model_type")
    if kind != "qwen2_vl":
        named = "".join(f" ({name})" for name in config.get("architectures") or ())
        raise CheckpointError(
            f"{folder} holds a {kind!r} model{named}; CREM's backbone is Qwen2-VL (model_type 'qwen2_vl', "
            "Qwen2VLForConditionalGeneration): set model.backbone to one"
        )
    return config


def _read_backbone(folder: Path, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    backbone_config(folder)
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


def _read_processors(folder: Path, config: ModelConfig) -> tuple[Any, Any]:
    """Tokenizer and image processor of a backbone's or CREM's checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = image_processor(None, folder, config.image)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer or image processor in {folder} cannot be read ({type(error).__name__}: {error}); copy the "
            "checkpoint again"
        ) from error
    # without tokenizer.json transformers gives an empty tokenizer, and no error
    if missing := set(SPECIAL_TOKENS) - set(tokenizer.get_vocab()):
        raise CheckpointError(
            f"the tokenizer in {folder} lacks Qwen2-VL's {', '.join(sorted(missing))}; copy the checkpoint again"
        )
    return tokenizer, processor


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


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
