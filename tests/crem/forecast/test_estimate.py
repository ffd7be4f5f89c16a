"""The forecast of a run: true shapes, activation memory against what PyTorch keeps, ZeRO's layout."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks

from crem.config import BackboneShape, ModelConfig, RunConfig, load_config
from crem.data.collator import Batch, Collator
from crem.data.items import Item, TrainingExample
from crem.forecast.estimate import ASKED_DEVICES, assumed_row, full_chunk, need, step_flops
from crem.forecast.flops import Load, ModelFlops
from crem.forecast.memory import Weights, activations, device_memory, weights_of
from crem.forecast.shapes import meta_model, shape_of
from crem.model import attention
from crem.model.backbone import image_processor, model_from_shape, tokenizer_from_texts
from crem.model.build import build_model
from crem.model.chorus import add_chorus_tokens
from crem.model.crem import CremModel
from crem.model.lora import adapt
from tests.conftest import TEXTS
from tests.crem.train.runs import stock_backbone

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
    """Images of two sizes on both sides, texts, answers from everything and from the chorus tokens alone."""
    return collator.examples(
        [
            TrainingExample(
                Item("animals and nature " * i, [Image.new("RGB", (64 + 32 * (i % 3), 96), (20 * i, 9, 7))]),
                Item("describe it", [Image.new("RGB", (96, 96), (7, 20 * i, 9))] if i % 2 else ()),
                question="what is this?",
                answer="a red apple " * (1 + i),
                z=i % 2 == 0,
                target_key=i,
            )
            for i in range(4)
        ]
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
def test_activations_are_what_autograd_keeps(
    shape: str, variant: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fused attention, as on a GPU: the products that short sequences take on CPU keep their scores as well."""
    monkeypatch.setattr(attention, "_PRODUCTS_UP_TO", 0)
    overrides = [*VARIANTS[variant], f"model.gradient_checkpointing={str(checkpointing).lower()}"]
    model, collator, config = built(SHAPES[shape], overrides)
    batch = rows(collator)
    measured = kept_by_autograd(model, batch, config.train.precision == "bfloat16")
    counted = activations(SHAPES[shape], Load.of(batch), config, cuda=False)
    # checkpoints hold the rotary tables where autograd's hooks do not look
    saved = counted.saved - counted.tables * checkpointing
    assert saved == pytest.approx(measured, rel=0.04)


def test_a_frozen_vision_tower_has_no_backward_pass(tmp_path: Path) -> None:
    """Gradient checkpointing makes embeddings ask for gradients, patch embeddings too, unless that is switched off."""
    model, collator = build_model(
        ModelConfig.model_validate(
            {
                "backbone": stock_backbone(tmp_path / "stock"),
                "chorus_tokens": 4,
                "gradient_checkpointing": True,
                "dtype": "float32",
                "image": {"min_pixels": 4096, "max_pixels": 16384},
            }
        )
    )
    batch = rows(collator)
    assert batch.pixel_values is not None
    features = model.train().core.model.get_image_features(batch.pixel_values, batch.image_grid_thw, return_dict=True)
    assert not any(f.requires_grad for f in features.pooler_output)
    output = model(batch)
    (output.lm_loss_sum + output.embeddings.sum()).backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in trained.values()) and any("lora_A" in n for n in trained)


TOTALS = {"2b": 2_208_985_600, "7b": 8_291_375_616}
"""Parameters of the published checkpoints: 2.21 B and 8.29 B on their hub pages."""
REAL = [f"{base}{overlays}" for base in TOTALS for overlays in ("", "+full", "+64gpu", "+full+64gpu")]
REAL += ["2b+full+offload", "7b+full+offload-all"]


@pytest.mark.parametrize("preset", REAL)
def test_presets_fit_80_gb_at_their_true_shapes(preset: str) -> None:
    config = load_config(preset)
    weights = weights_of(meta_model(config.model))
    shape = shape_of(config.model)
    total, trained = weights.trained + weights.frozen, weights.trained
    if config.model.lora is None:
        assert total == trained == TOTALS[preset[:2]]
    else:
        D, F, r = shape.hidden_size, shape.intermediate_size, config.model.lora.r
        kv = D // shape.num_attention_heads * shape.num_key_value_heads
        adapters = shape.num_hidden_layers * r * (2 * 2 * D + 2 * (D + kv) + 3 * (D + F))
        assert trained == adapters + config.model.chorus_tokens * D, "adapters and the rows of the chorus tokens"
        assert weights.frozen == TOTALS[preset[:2]] and weights.frozen_bytes == 2 * weights.frozen
    chunk = full_chunk(config, shape, config.train.chunk_rows)
    memory = device_memory(config, weights, activations(shape, chunk, config), config.train.workers)
    print(  # noqa: T201
        f"{preset}: {total / 1e9:.2f} B parameters, {trained / 1e6:.1f} M trained; on each of {config.train.workers} "
        f"GPUs {memory.weights / 1e9:.1f} GB weights, {memory.optimizer / 1e9:.1f} GB optimizer, "
        f"{memory.activations / 1e9:.1f} GB activations, {memory.total / 1e9:.1f} GB in all"
    )
    assert memory.total < 72e9, "80 GB less a tenth for what is not known"
    flops = ModelFlops.of_backbone(meta_model(config.model))
    fewest = need(config, shape, weights, flops, assumed_row(config, shape), chunk, ASKED_DEVICES[0])
    assert fewest.workers is not None and fewest.workers <= 8 and fewest.chunk_rows == config.train.chunk_rows


def zero(overrides: list[str], ranks: int) -> tuple[float, ...]:
    """Gigabytes of weights, gradients and optimizer on a device, and in its host's memory; 10^9 trained parameters."""
    config = load_config("2b+full", ["train.offload=none", *overrides])
    weights = Weights(frozen=0, frozen_bytes=0, trained=10**9, largest=0)
    none = activations(SHAPES["narrow and deep"], Load(1, 1, 1, 1), config)
    m = device_memory(config, weights, none, ranks)
    return tuple(round(part / 1e9, 3) for part in (m.weights, m.gradients, m.optimizer, m.host))


def test_zero_partitions_by_stage() -> None:
    """float32 all through: 4 bytes for weights and gradients, 8 for the moments; ZeRO 1 and 2 copy their part."""
    assert zero(["train.zero_stage=0"], 8) == (4, 4, 8, 0)
    assert zero(["train.zero_stage=1"], 8) == (4, 4, 1.5, 0)
    assert zero(["train.zero_stage=2"], 8) == (4, 0.5, 1.5, 0)
    assert zero(["train.zero_stage=3"], 8) == (0.5, 0.5, 1, 0)
    assert zero(["train.zero_stage=2", "train.offload=optimizer"], 8) == (4, 0, 0, 2)
    assert zero(["train.zero_stage=3", "train.offload=optimizer"], 8) == (0.5, 0, 0, 2)
    assert zero(["train.zero_stage=3", "train.offload=all"], 8) == (0, 0, 0, 2.5)
    assert zero(["train.zero_stage=3"], 64) == tuple(round(v / 64, 3) for v in (4, 4, 8, 0))


def test_the_fewest_gpus_are_found() -> None:
    """With one less (the next divisor of the batch below), or with a chunk twice as large, it would not fit."""
    config = load_config("7b+full")
    shape, weights = shape_of(config.model), weights_of(meta_model(config.model))
    chunk, flops = full_chunk(config, shape, 8), ModelFlops.of_backbone(meta_model(config.model))
    assert [(d.memory_gb, d.name) for d in ASKED_DEVICES] == [(80, "H100"), (40, "A100"), (24, "L4")]
    for device in ASKED_DEVICES:
        fewest = need(config, shape, weights, flops, assumed_row(config, shape), chunk, device)
        assert fewest.workers is not None and fewest.memory.total <= device.memory_gb * 1e9
        part = chunk.scaled(fewest.chunk_rows / 8)
        fewer = device_memory(config, weights, activations(shape, part, config), fewest.workers // 2)
        assert fewer.total > device.memory_gb * 1e9
    fewest = need(config, shape, weights, flops, assumed_row(config, shape), chunk, ASKED_DEVICES[0])
    assert fewest.workers in (2, 4, 8)


def test_flops_are_twice_the_weights_for_each_token() -> None:
    """Short sequences: attention over the context is negligible; the language model's matrices are 1.31 B in 2B."""
    row = Load(tokens=10, patches=4, answer_tokens=1, sequences=1, images=1)
    core = meta_model(ModelConfig(lora=None))
    text, vision, head = ModelFlops.of_backbone(core).by_part(row)
    matrices = {n: p.numel() for n, p in core.named_parameters() if p.ndim > 1 and "embed_tokens" not in n}
    assert text.forward == 2 * 10 * sum(v for n, v in matrices.items() if "language_model" in n)
    tower = sum(v for n, v in matrices.items() if "visual" in n and "merger" not in n)
    merger = sum(v for n, v in matrices.items() if "merger" in n)
    assert vision.forward == 2 * 4 * tower + 2 * merger
    assert head.forward == 2 * 1536 * 151936
    # cached pass, forward, backward once or twice, recomputation; adapters are a hundredth of the matrices
    for lora, passes in ((None, (5, 5, 3)), ({"r": 16}, (4, 2, 2))):
        config = load_config("2b", ["train.global_batch=1024"])
        config = config.model_copy(update={"model": ModelConfig(lora=lora, gradient_checkpointing=True)})  # type: ignore[arg-type]
        flops = ModelFlops.of_backbone(meta_model(config.model))
        forward = (text.forward, vision.forward, head.forward)
        expected = 1024 * sum(n * work for n, work in zip(passes, forward, strict=True))
        assert step_flops(config, flops, row, True) == pytest.approx(expected, rel=0.03)
