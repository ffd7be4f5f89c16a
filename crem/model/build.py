"""A new CREM model: random from a shape, or a pretrained backbone with new chorus rows and LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crem.config import ModelConfig
from crem.data.collator import Collator
from crem.errors import ConfigError
from crem.fetch import local_copy
from crem.model.backbone import CHAT_TEMPLATE, image_processor, model_from_shape, tokenizer_from_texts
from crem.model.chorus import add_chorus_tokens, initialise_rows
from crem.model.crem import CremModel
from crem.model.lora import adapt
from crem.model.pretrained import dtype_of, read_backbone, read_processors

__all__ = ["build_collator", "build_model"]


def build_model(config: ModelConfig, *, texts: list[str] | None = None, seed: int = 0) -> tuple[CremModel, Collator]:
    """A new CREM model: random from ``config.scratch``, or a pretrained backbone with new chorus rows and LoRA.

    Args:
        texts: training texts, from which a scratch model's tokenizer is trained.

    Raises:
        ConfigError, CheckpointError, ResourceError: with the remedy.
    """
    if config.scratch is not None:
        if not texts:
            raise ConfigError("a model from scratch trains its tokenizer and needs texts; give the prepared rows")
        # spare rows, as in Qwen2-VL's matrix: chorus tokens can be added to the trained backbone without growing it
        room = config.scratch.vocab_size - max(config.chorus_tokens, config.scratch.vocab_size // 32)
        tokenizer = tokenizer_from_texts(texts, room)
        tokenizer.chat_template = CHAT_TEMPLATE
        chorus_ids = add_chorus_tokens(tokenizer, config.chorus_tokens)
        backbone, stock = model_from_shape(config.scratch, tokenizer, seed), None
        processor = image_processor(config.scratch, None, config.image)
    else:
        assert config.backbone is not None
        folder = local_copy(config.backbone)
        # trained weights are float32; frozen weights stay in the inference dtype
        backbone = read_backbone(folder, torch.float32 if config.lora is None else dtype_of(config.dtype))
        tokenizer, processor = read_processors(folder, config)
        known = len(tokenizer)
        chorus_ids = add_chorus_tokens(tokenizer, config.chorus_tokens)
        embedding = backbone.get_input_embeddings().weight
        if max(chorus_ids) >= embedding.shape[0]:
            with _seeded(seed):
                backbone.resize_token_embeddings(max(chorus_ids) + 1)
        # a CREM checkpoint used as backbone has trained chorus rows; they are kept
        initialise_rows(backbone.get_input_embeddings().weight.data, [i for i in chorus_ids if i >= known], seed=seed)
        stock = folder
    with _seeded(seed):
        adapted = backbone if config.lora is None else adapt(backbone, chorus_ids, config)
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        # It makes the embeddings require gradients, patch embeddings too, which only reentrant checkpointing needs: a
        # frozen vision tower would be kept in memory, recomputed and backpropagated without use. (PEFT does it too.)
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
    """The same random weights on every rank, whatever was drawn before; the generator is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
