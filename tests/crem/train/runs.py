"""Small training runs, comparable across optimizers, ranks and ZeRO stages.

``pairs`` gives the rows of a step; rank r of W trains on the r-th of W equal slices. ``PlainEngine`` is what DeepSpeed
is compared with: PyTorch's AdamW, gradients averaged over ranks, global clipping, the same learning-rate schedule.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from crem.config import ModelConfig, RunConfig, load_config
from crem.data.collator import Batch, Collator
from crem.data.items import Item, TrainingExample
from crem.model.backbone import CHAT_TEMPLATE, compile_layers, image_processor, model_from_shape, tokenizer_from_texts
from crem.model.build import build_model
from crem.model.crem import CremModel
from crem.train.minimal import AdamWEngine
from crem.train.step import train_step
from tests.conftest import TEXTS, TINY, lively

ROWS = 8
STEPS = 5
CASES: dict[str, tuple[str, ...]] = {
    "mixed": (),
    "uneven answers": (),
    "no answers": (),
    "no images": (),
    "uneven pairs": (),
    "no questions": (),
    "hard negatives": (),
    "duplicates": (),
    "query to target": ("loss.symmetric=false",),
    "margin": ("loss.false_negative_margin=0.05",),
    "nested": (),
}
"""Rows of a step (``pairs``) and settings of the loss, whose symmetric form is the default here."""
NESTED = (None, 2, 1)
"""Chorus counts of the steps of "nested", in turn."""


def run_config(*overrides: str) -> RunConfig:
    """The two-layer model, trained on ``ROWS`` rows a step with a schedule that moves within three steps.

    AdamW divides by the size of the gradient: where that is rounding (key biases cannot change a softmax) it would blow
    rounding up to whole steps, so eps is well above it.
    """
    settings = [
        f"train.global_batch={ROWS}",
        "train.steps=8",
        "optim.warmup_steps=2",
        "optim.eps=1e-3",
        "optim.lr=1e-2",
        "optim.max_grad_norm=1.0",
        "loss.temperature=0.2",
    ]
    return load_config("micro", [*TINY, *settings, *overrides])


def pairs(case: str, step: int = 0) -> list[TrainingExample]:
    """Rows of one step; in the uneven cases the second half, which rank 1 of 2 gets, differs from the first."""
    rows = []
    for i in range(ROWS):
        second = i >= ROWS // 2
        answered = i % 2 == 0 and case != "no questions" and not (case == "no answers" and second)
        with_image = i % 3 != 2 and not (case == "no images" and second)
        paired = (i % 4 != 3 or case == "no questions") and not (case == "uneven pairs" and second and i != ROWS - 2)
        answer = "a red apple" if not (case == "uneven answers" and second) else "food and drink " * 4
        images = [Image.new("RGB", (64, 64), (30 * i, 20 * step, 9 * i))] if with_image else []
        negatives = (1 if i == 1 else 0) if case != "hard negatives" else i % 3
        rows.append(
            TrainingExample(
                Item(f"animals {i} and {step}", images),
                Item(f"describe {i * 7 + step}") if paired else None,
                tuple(Item(f"green {i}" + " square" * n) for n in range(negatives)) if paired else (),
                "what is this?" if answered or not paired else None,
                answer if answered or (not paired and case != "no answers") else None,
                z=i % 4 < 2,
                query_key=i % 5 if case == "duplicates" else -1,
                target_key=i % 3 if case == "duplicates" else i,
            )
        )
    return rows


def share(collator: Collator, case: str, step: int, rank: int, ranks: int, chunks: int = 1) -> list[Batch]:
    """This rank's share of a step, in chunks."""
    size = ROWS // ranks // chunks
    rows, first = pairs(case, step), rank * chunks
    count = NESTED[step % len(NESTED)] if case == "nested" else None
    parts = [rows[i * size : (i + 1) * size] for i in range(first, first + chunks)]
    return [collator.examples(part, chorus_tokens=count) for part in parts]


def trained(
    case: str, *overrides: str, rank: int = 0, ranks: int = 1, chunks: int = 1, steps: int = STEPS, seed: int = 0
) -> dict[str, Any]:
    """``steps`` steps by plain PyTorch: terms and gradients of every step, weights after the last."""
    config = run_config(*CASES[case], *overrides)
    model, collator = started(config)
    if config.train.compile:
        compile_layers(model.core)
    engine = PlainEngine(model, config, chunks)
    terms, gradients = [], []
    for step in range(steps):
        # each of a step's chunks has its own seed, whichever rank holds it
        first = seed + (step * ranks + rank) * chunks
        result = train_step(engine, share(collator, case, step, rank, ranks, chunks), config.loss, seed=first)
        terms.append([float(value) for value in asdict(result).values()])
        gradients.append(engine.gradients)
    return {"terms": torch.tensor(terms, dtype=torch.float64), "gradients": gradients, "weights": model.state_dict()}


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Terms, gradients and weights of two ``trained`` runs.

    Terms agree to ``tolerance`` of themselves. Of each gradient and weight the difference is measured against its
    largest entry, and that of a gradient against at least 1e-2: the key biases' are rounding around zero.
    """
    torch.testing.assert_close(got["terms"], expected["terms"], atol=0, rtol=tolerance)
    for step, (ours, theirs) in enumerate(zip(got["gradients"], expected["gradients"], strict=True)):
        assert ours.keys() == theirs.keys()
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        assert largest > 1e-3, "there is something to compare"
        for name, gradient in theirs.items():
            scale = max(float(gradient.abs().max()), min(largest, 1e-2))
            difference = float((ours[name] - gradient).abs().max()) / scale
            assert difference < tolerance, (step, name, difference)
    for name, weight in expected["weights"].items():
        difference = float((got["weights"][name] - weight).abs().max()) / max(float(weight.abs().max()), 1e-2)
        assert difference < tolerance, (name, difference)


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up from 0, then linear decay to 0 at the last step."""
    warm, total = config.optim.warmup_steps, config.train.steps
    return config.optim.lr * min(step / warm, (total - step) / (total - warm))


class PlainEngine(AdamWEngine):
    """Steps once in ``chunks`` times, on the mean gradient of all ranks, at the learning rate of the schedule."""

    def __init__(self, model: CremModel, config: RunConfig, chunks: int = 1):
        super().__init__(model, config.optim)
        self.config, self.chunks, self.backwards = config, chunks, 0
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.steps = 0
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def backward(self, loss: Tensor) -> None:
        (loss / self.chunks).backward()
        self.backwards += 1

    def step(self) -> None:
        if self.backwards < self.chunks:
            return
        self.backwards = 0
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if dist.is_initialized():
            together = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
            dist.all_reduce(together)
            together /= dist.get_world_size()
            for parameter, part in zip(
                self.parameters, together.split([p.numel() for p in self.parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter)
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm)
        self.norms.append(float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1


def started(config: RunConfig) -> tuple[CremModel, Collator]:
    """The same lively model on every rank and in the reference, in training."""
    model, collator = build_model(config.model, texts=TEXTS)
    if config.model.lora is None:
        lively(model)
    else:  # adapters start with B = 0, which would hide the gradient of A
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
    return model.train(), collator


def stock_backbone(folder: Path, *, vocab_size: int = 512, tied: bool = True, **config: Any) -> str:
    """Save a tiny Qwen2-VL as transformers does, without anything of CREM; returns the folder."""
    shape = load_config("micro", [*TINY, f"model.scratch.vocab_size={vocab_size}"]).model.scratch
    assert shape is not None
    shape = shape.model_copy(update={"tie_word_embeddings": tied, **config})
    tokenizer = tokenizer_from_texts(TEXTS, 400)
    tokenizer.chat_template = CHAT_TEMPLATE
    model: Qwen2VLForConditionalGeneration = model_from_shape(shape, tokenizer, seed=0)
    lively(model)
    for part in (model, tokenizer, image_processor(shape, None, ModelConfig().image)):
        part.save_pretrained(folder)
    return str(folder)


def spawn(worker: Callable[..., None], ranks: int, folder: Path, *args: Any) -> None:
    """Run ``worker(rank, folder, *args)`` in ``ranks`` processes joined by gloo."""
    mp.start_processes(_joined, args=(worker, ranks, folder, args), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]


def _joined(rank: int, worker: Callable[..., None], ranks: int, folder: Path, args: tuple[Any, ...]) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        worker(rank, folder, *args)
    finally:
        dist.destroy_process_group()
