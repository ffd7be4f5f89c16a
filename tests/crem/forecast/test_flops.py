"""FLOPs of a step against a count by hand and against PyTorch's own counter, which sees every matrix product."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crem.data.collator import Batch
from crem.data.prompts import Segment
from crem.forecast.devices import DEVICES, device_named, peak_flops
from crem.forecast.flops import Load, ModelFlops, visible_pairs
from crem.model.attention import compression_aware_mask
from crem.model.build import build_model
from crem.model.crem import CremModel
from tests.conftest import TEXTS
from tests.crem.train.runs import pairs, run_config, stock_backbone

LORA = ["model.lora={r: 4, alpha: 8, dropout: 0.0}", "model.scratch=null"]


def counted(model: CremModel, batch: Batch) -> dict[str, float]:
    """FLOPs of one forward and backward by PyTorch's counter: matrices of weights, and all products of attention."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # which computes attention by batched products, that are counted
        out = model(batch)
        (out.embeddings.sum() + out.lm_loss_sum).backward()
    by_op = {str(op): float(flops) for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in by_op.items() if "bmm" in op)
    return {"weights": sum(by_op.values()) - attention, "attention": attention}


def batch_of(overrides: list[str], flat: bool = True) -> tuple[CremModel, Batch]:
    config = run_config(*overrides)
    model, collator = build_model(config.model, texts=TEXTS)
    return model.train(), collator.examples(pairs("mixed"), flat=flat)


def weights_only(flops: ModelFlops, batch: Batch) -> float:
    return flops.useful(replace(Load.of(batch), text_pairs=0, vision_pairs=0))


def test_by_hand() -> None:
    """Every matrix of the tiny model, written out."""
    model, batch = batch_of([])
    assert batch.image_grid_thw is not None
    tokens, answers = int((batch.segments >= 0).sum()), int((batch.segments == Segment.A).sum())
    patches = int(batch.image_grid_thw.prod(1).sum())
    text = 2 * (48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 96)  # two layers: q; k and v of two heads; o; gate, up, down
    vision = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 4 * 32)  # two blocks: qkv; proj; an MLP of four times the width
    area = model.core.config.vision_config.spatial_merge_size**2
    patch = batch.pixel_values.shape[1] * 32 if batch.pixel_values is not None else 0
    merger = (32 * area) ** 2 + 32 * area * 48
    vocabulary = model.core.config.text_config.vocab_size
    expected = 6 * (text * tokens + vision * patches + merger * patches // area + 48 * vocabulary * answers)
    expected += 4 * patch * patches  # pixels need no gradient
    assert weights_only(ModelFlops.of(model), batch) == expected


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_as_the_counter_has_them(kind: str, tmp_path: Path) -> None:
    """Within 1 %. With LoRA the frozen matrices cost 4 instead of 6, the frozen vision tower 2."""
    overrides = [] if kind == "full" else [*LORA, f"model.backbone={stock_backbone(tmp_path)}"]
    model, batch = batch_of(overrides)
    assert weights_only(ModelFlops.of(model), batch) == pytest.approx(counted(model, batch)["weights"], rel=0.01)


def test_recomputation_is_not_useful() -> None:
    """Gradient checkpointing runs more products; the count stays."""
    model, batch = batch_of([])
    again, _ = batch_of(["model.gradient_checkpointing=true"])
    assert ModelFlops.of(again) == ModelFlops.of(model)
    assert counted(again, batch)["weights"] > 1.15 * counted(model, batch)["weights"]


def test_attention_is_counted_at_visible_pairs() -> None:
    """The counter sees whole rectangles; ours are the visible pairs in them, as many as the mask has."""
    model, batch = batch_of([])
    mask = compression_aware_mask(batch.segments, batch.sequence_ids, batch.z)
    real = (batch.sequence_ids >= 0).flatten()
    assert visible_pairs(batch) == int(mask[0, 0][real].sum())
    assert bool(batch.z.any()) and not bool(batch.z.all())
    flops = ModelFlops.of(model)
    ours = flops.of_batch(batch) - weights_only(flops, batch)
    assert 0.4 * counted(model, batch)["attention"] < ours < counted(model, batch)["attention"]


def test_without_the_template_fewer_pairs_are_visible() -> None:
    _, batch = batch_of(["model.prompt.system=Look!"])
    mask = compression_aware_mask(batch.segments, batch.sequence_ids, batch.z, template_visible=False)
    assert visible_pairs(batch, template_visible=False) == int(mask.sum()) < visible_pairs(batch)


def test_a_step_executes_what_is_computed_again(tmp_path: Path) -> None:
    """Against PyTorch's counter: a pass without gradient for caching, recomputed layers, a frozen vision tower."""
    for overrides in ([], [*LORA, f"model.backbone={stock_backbone(tmp_path)}"]):
        model, batch = batch_of(overrides)
        flops, load = ModelFlops.of(model), replace(Load.of(batch), text_pairs=0, vision_pairs=0)
        assert flops.executed(load, cached=False, recomputed=False) == flops.useful(load)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(batch, embed_only=True)
        forward = sum(float(f) for op, f in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
        again = flops.executed(load, cached=True, recomputed=False) - flops.useful(load)
        assert again == pytest.approx(forward, rel=0.01)
        checkpointed, _ = batch_of([*overrides, "model.gradient_checkpointing=true"])
        executed = flops.executed(load, cached=False, recomputed=True)
        # layers are recomputed, the patch projection and the merger are not; here they are a large share of the tower
        assert (
            0.97 * counted(checkpointed, batch)["weights"] <= executed <= 1.12 * counted(checkpointed, batch)["weights"]
        )


def test_peaks() -> None:
    """A GPU by its name, the longest known part of it; the CPU by measurement, at a rate that it can have."""
    h100, pcie = device_named("NVIDIA H100 80GB HBM3"), device_named("NVIDIA H100 PCIe")
    assert h100 is not None and pcie is not None and h100.peak_flops == 989e12 and pcie.peak_flops < 989e12
    small, large = device_named("NVIDIA A100-SXM4-40GB"), device_named("NVIDIA A100-SXM4-80GB")
    assert small is not None and large is not None and (small.memory_gb, large.memory_gb) == (40, 80)
    assert device_named("Some other GPU") is None
    assert len({d.name for d in DEVICES}) == len(DEVICES) and all(np.isfinite([d.peak_flops for d in DEVICES]))
    flops, source = peak_flops(torch.device("cpu"), "float32")
    assert 1e8 < flops < 1e14 and "measured" in source
