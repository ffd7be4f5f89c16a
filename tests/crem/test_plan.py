"""What a run is said to need: true shapes, activation memory against what PyTorch keeps, ZeRO's layout."""

from __future__ import annotations

import weakref

import pytest
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks

from crem.checkpoint import adapt
from crem.config import BackboneShape, RunConfig, load_config
from crem.data.collator import Batch, Collator
from crem.data.items import Item, Pair
from crem.model.backbone import image_processor, model_from_shape, tokenizer_from_texts
from crem.model.chorus import add_chorus_tokens
from crem.model.crem import CremModel
from crem.train.memory import Chunk, activations
from tests.conftest import TEXTS

SHAPES = {
    "narrow and deep": BackboneShape(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, vision_depth=4, vision_embed_dim=64, vision_num_heads=4, patch_size=8,
    ),
    "wide, one key-value head": BackboneShape(
        vocab_size=1024, hidden_size=192, intermediate_size=256, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=1, vision_depth=2, vision_embed_dim=48, vision_num_heads=3, patch_size=16,
    ),
    "untied, much vision": BackboneShape(
        vocab_size=512, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, vision_depth=6, vision_embed_dim=96, vision_num_heads=4, patch_size=8,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def built(shape: BackboneShape, overrides: list[str]) -> tuple[CremModel, Collator, RunConfig]:
    config = load_config("micro", ["model.image={min_pixels: 4096, max_pixels: 16384}", *overrides])
    tokenizer = tokenizer_from_texts(TEXTS, 400)
    chorus_ids = add_chorus_tokens(tokenizer, config.model.chorus_tokens)
    backbone = model_from_shape(shape, tokenizer, 0)
    adapted = backbone
    if config.model.lora is not None:
        dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
        adapted = adapt(backbone.to(dtype), chorus_ids, config.model)
    if config.model.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.disable_input_require_grads()
    collator = Collator(tokenizer, image_processor(shape, None, config.model.image), chorus_ids, config.model)
    return CremModel(adapted, chorus_ids, config.model).train(), collator, config


def rows(collator: Collator) -> Batch:
    """Pictures of two sizes on both sides, texts, answers from everything and from the chorus tokens alone."""
    return collator.pairs(
        [
            Pair(
                Item("animals and nature " * i, [Image.new("RGB", (64 + 32 * (i % 3), 96), (20 * i, 9, 7))]),
                Item("describe it", [Image.new("RGB", (96, 96), (7, 20 * i, 9))] if i % 2 else ()),
                question="what is this?",
                answer="a red apple " * (1 + i),
                z=i % 2 == 0,
                target_key=i,
            )
            for i in range(8)
        ]
    )


def chunk_of(batch: Batch) -> Chunk:
    assert batch.two_part is not None and batch.pixel_values is not None
    return Chunk(
        tokens=batch.tokens,
        patches=len(batch.pixel_values),
        answer_tokens=int(batch.answer_tokens),
        sequences=len(batch.z),
        attended=sum(group.queries_GQ.numel() for group in batch.two_part.groups),
    )


class Kept:
    """A tensor in the graph, as long as the graph holds it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def kept_by_autograd(model: CremModel, batch: Batch, autocast: bool) -> int:
    """Bytes of distinct storages that the forward pass keeps for the backward pass, without weights and the batch."""
    assert batch.two_part is not None
    held = [*model.parameters(), *model.buffers(), batch.pixel_values, batch.input_ids, batch.two_part.order_T]
    held += [t for group in batch.two_part.groups for t in group]
    own = {t.untyped_storage().data_ptr() for t in held if t is not None}
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        holder = Kept(tensor)
        kept.add(holder)
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor), torch.autocast("cpu", torch.bfloat16, autocast):
        output = model(batch)
    assert output.embeddings.requires_grad
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in kept}
    return sum(size for address, size in storages.items() if address not in own)


LORA = ["model.lora={r: 4, alpha: 8, dropout: 0.1}"]
VARIANTS = {
    "full fp32": [],
    "full bf16": ["train.precision=bfloat16"],
    "lora fp32": LORA,
    "lora bf16": [*LORA, "train.precision=bfloat16", "model.dtype=bfloat16"],
    "lora bf16, no dropout": [
        "model.lora={r: 4, alpha: 8, dropout: 0.0}",
        "train.precision=bfloat16",
        "model.dtype=bfloat16",
    ],
    "lora bf16 over fp32": [*LORA, "train.precision=bfloat16"],
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_keeps(shape: str, variant: str, checkpointing: bool) -> None:
    overrides = [*VARIANTS[variant], f"model.gradient_checkpointing={str(checkpointing).lower()}"]
    model, collator, config = built(SHAPES[shape], overrides)
    batch = rows(collator)
    measured = kept_by_autograd(model, batch, config.train.precision == "bfloat16")
    told = activations(SHAPES[shape], chunk_of(batch), config, cuda=False)
    # checkpoints hold the rotary tables where autograd's hooks do not look
    saved = told.saved - told.tables * checkpointing
    print(f"{shape}, {variant}, {checkpointing=}: told {saved:,}, kept {measured:,}: {saved / measured:.3f}")
    assert saved == pytest.approx(measured, rel=0.04)
