"""Gradient caching: chunks give what the whole batch gives, and a chunk's second pass repeats its first exactly.

One process, fp32, bound 1e-5 (``assert_same``); ranks are in ``test_distributed``, ZeRO stages in ``test_zero``.
"""

from __future__ import annotations

import shutil
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from crem.data.collator import Batch
from crem.losses import joint_loss, lm_loss
from crem.model.crem import CremModel, CremOutput
from crem.train.step import retrieval_of, train_step
from tests.crem.train.runs import (
    CASES,
    PlainEngine,
    assert_same,
    pairs,
    run_config,
    share,
    started,
    stock_backbone,
    trained,
)

CHUNKS = (2, 4, 8)
CHECKPOINTED = "model.gradient_checkpointing=true"


@cache
def whole(case: str) -> dict[str, Any]:
    return trained(case)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_the_whole_batch(case: str, chunks: int) -> None:
    """With eight chunks each is one row: without target, without answer, without image or without any of them."""
    assert_same(trained(case, chunks=chunks), whole(case))


def test_recomputed_activations_change_nothing() -> None:
    assert_same(trained("mixed", CHECKPOINTED, chunks=2), whole("mixed"))
    assert_same(trained("nested", CHECKPOINTED, chunks=4), whole("nested"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("overrides", [(), (CHECKPOINTED,)], ids=["kept", "recomputed"])
def test_compiled_layers_change_nothing(overrides: tuple[str, ...]) -> None:
    assert_same(trained("nested", "train.compile=true", *overrides, chunks=2), whole("nested"))


def test_every_case_is_another_run() -> None:
    """What a case is about decides its terms, so that agreement on it says something."""
    firsts = {case: whole(case)["terms"][0] for case in CASES if case != "nested"}  # its first step has all K
    for case, terms in firsts.items():
        assert case == "mixed" or (terms - firsts["mixed"]).abs().max() > 1e-3, case
    assert (whole("nested")["terms"] - whole("mixed")["terms"]).abs().max(1).values[1] > 1e-3
    keys = [p.target_key for p in pairs("duplicates") if p.target]
    assert len(set(keys[: len(keys) // 2]) & set(keys[len(keys) // 2 :])) > 1, "equal targets are in several chunks"
    assert whole("no questions")["terms"][:, 3].eq(0).all() and whole("no questions")["terms"][:, 2].eq(0).all()


class Recorded(PlainEngine):
    """Keeps the embeddings of every forward, with and without gradient."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.cached: list[Tensor] = []
        self.replayed: list[Tensor] = []

    def __call__(self, batch: Batch, *, embed_only: bool = False) -> CremOutput:
        assert embed_only != torch.is_grad_enabled()
        output = super().__call__(batch, embed_only=embed_only)
        (self.replayed if torch.is_grad_enabled() else self.cached).append(output.embeddings.detach())
        return output


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stock_backbone(tmp_path_factory.mktemp("dropout") / "backbone")


def lora(backbone: str, dropout: float = 0.0) -> list[str]:
    return [f"model.lora={{r: 4, alpha: 8, dropout: {dropout}}}", "model.scratch=null", f"model.backbone={backbone}"]


def attention_dropout(model: CremModel, share_dropped: float) -> None:
    for layer in model.core.model.language_model.layers:
        layer.self_attn.attention_dropout = share_dropped


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dropped", ["lora", "attention", "both"])
def test_dropout_is_replayed(backbone: str, dropped: str, checkpointed: bool) -> None:
    """The second pass has the first's embeddings bit for bit, and the gradient is that of one graph over all chunks."""
    overrides = lora(backbone, 0.3) if dropped != "attention" else []
    config = run_config(*overrides, f"model.gradient_checkpointing={str(checkpointed).lower()}")
    model, collator = started(config)
    attention_dropout(model, 0.3 if dropped != "lora" else 0.0)
    chunks, seed = share(collator, "mixed", 0, 0, 1, 4), 90

    engine = Recorded(model, config, 4)
    result = train_step(engine, chunks, config.loss, seed=seed)
    assert len(engine.cached) == len(engine.replayed) == 4
    assert all(torch.equal(a, b) for a, b in zip(engine.cached, engine.replayed, strict=True))

    oracle, _ = started(config)
    attention_dropout(oracle, 0.3 if dropped != "lora" else 0.0)
    outputs = []
    for number, chunk in enumerate(chunks):
        torch.manual_seed(seed + number)
        outputs.append(oracle(chunk))
    retrieval = retrieval_of(torch.cat([o.embeddings for o in outputs]), chunks, config.loss).loss
    tokens = sum(int(chunk.answer_tokens) for chunk in chunks)
    generation = lm_loss(torch.stack([o.lm_loss_sum for o in outputs]).sum(), tokens)
    joint_loss(retrieval, generation, config.loss).backward()
    assert result.retrieval == pytest.approx(retrieval.item(), rel=1e-5)
    assert result.generation == pytest.approx(generation.item(), rel=1e-5)
    for name, parameter in oracle.named_parameters():
        if parameter.grad is None:
            assert name not in engine.gradients or not engine.gradients[name].any()
            continue
        scale = max(float(parameter.grad.abs().max()), 1e-2)
        assert float((engine.gradients[name] - parameter.grad).abs().max()) < 1e-5 * scale, name

    other, _ = started(config)
    attention_dropout(other, 0.3 if dropped != "lora" else 0.0)
    again = Recorded(other, config, 4)
    train_step(again, chunks, config.loss, seed=seed + 4)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(engine.cached, again.cached, strict=True)), (
        "dropout took part"
    )


def test_every_chunk_draws_its_own_dropout(backbone: str) -> None:
    config = run_config(*lora(backbone, 0.3))
    model, collator = started(config)
    same = [collator.examples(pairs("mixed")[:2]) for _ in range(2)]
    engine = Recorded(model, config, 2)
    train_step(engine, same, config.loss)
    assert (engine.cached[0] - engine.cached[1]).abs().max() > 1e-4


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_under_lora(backbone: str, chunks: int) -> None:
    assert_same(trained("mixed", *lora(backbone), chunks=chunks), trained("mixed", *lora(backbone)))


class Autocast(PlainEngine):
    def __call__(self, batch: Batch, *, embed_only: bool = False) -> CremOutput:
        with torch.autocast("cpu", torch.bfloat16):
            return super().__call__(batch, embed_only=embed_only)


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_in_bfloat16(chunks: int) -> None:
    """Bounds: 0.5 % of the terms and 2 % of the whole gradient; a bf16 product keeps 8 bits, i.e. 0.4 % of each entry.

    The chunks' gradients of a weight are rounded one by one before they are added, which the whole batch's is once.
    """
    config = run_config()
    results, gradients = [], []
    for count in (1, chunks):
        model, collator = started(config)
        engine = Autocast(model, config, count)
        result = train_step(engine, share(collator, "mixed", 0, 0, 1, count), config.loss)
        results.append([result.loss, result.retrieval, result.generation])
        gradients.append(torch.cat([gradient.flatten() for gradient in engine.gradients.values()]))
    assert results[1] == pytest.approx(results[0], rel=5e-3)
    assert results[0] != pytest.approx(whole("mixed")["terms"][0, :3].tolist(), rel=1e-6), "autocast took part"
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
