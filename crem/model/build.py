"""A new CREM model: random from a shape, or a pretrained backbone with fresh chorus rows and LoRA."""

from __future__ import annotations

import json
import math
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
from crem.host_memory import available_bytes
from crem.model.backbone import CHAT_TEMPLATE, SPECIAL_TOKENS, image_processor, model_from_shape, tokenizer_from_texts
from crem.model.chorus import add_chorus_tokens, initialise_rows
from crem.model.crem import CremModel
from crem.model.lora import adapt

__all__ = ["build_collator", "build_model", "dtype_of", "read_backbone", "read_config", "read_processors"]


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
        backbone = read_backbone(folder, torch.float32 if config.lora is None else dtype_of(config.dtype))
        tokenizer, processor = read_processors(folder, config)
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
    tokenizer, processor = read_processors(local_copy(config.backbone), config)
    return Collator(tokenizer, processor, add_chorus_tokens(tokenizer, config.chorus_tokens), config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same random weights on every rank, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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
    # without tokenizer.json transformers gives an empty tokenizer, and no error
    if missing := set(SPECIAL_TOKENS) - set(tokenizer.get_vocab()):
        raise CheckpointError(
            f"the tokenizer in {folder} lacks Qwen2-VL's {', '.join(sorted(missing))}; copy the checkpoint again"
        )
    return tokenizer, processor


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a name in the configuration."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
