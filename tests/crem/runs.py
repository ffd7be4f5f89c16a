"""Small training runs, comparable across optimizers, ranks and ZeRO stages.

``pairs`` gives the rows of a step; rank r of W trains on the r-th of W equal slices. ``PlainEngine`` is what DeepSpeed
is compared with: PyTorch's AdamW, gradients averaged over ranks, global clipping, the same learning-rate schedule.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
from crem.data.items import Item, Pair
from crem.model.backbone import CHAT_TEMPLATE, image_processor, model_from_shape, tokenizer_from_texts
from crem.model.crem import CremModel, CremOutput
from crem.train.optim import parameter_groups
from tests.conftest import TEXTS, TINY, lively

ROWS = 8
STEPS = 3
CASES = ("mixed", "uneven answers", "no answers", "no images", "uneven pairs")


def run_config(*overrides: str) -> RunConfig:
    """The two-layer model, trained on ``ROWS`` rows a step with a schedule that moves within three steps.

    AdamW divides by the size of the gradient: where that is rounding (key biases cannot change a softmax) it would blow
    rounding up to whole steps, so eps is well above it.
    """
    settings = [
        f"train.global_batch={ROWS}",
        "train.steps=8",
        "optim.warmup_steps=2",
        "optim.eps=1e-4",
        "optim.lr=1e-2",
        "optim.max_grad_norm=1.0",
        "loss.temperature=0.2",
    ]
    return load_config("micro", [*TINY, *settings, *overrides])


def pairs(case: str, step: int = 0) -> list[Pair]:
    """Rows of one step; in the uneven cases the second half, which rank 1 of 2 gets, differs from the first."""
    rows = []
    for i in range(ROWS):
        second = i >= ROWS // 2
        answered = i % 2 == 0 if case != "no answers" else i % 2 == 0 and not second
        with_image = i % 3 != 2 and not (case == "no images" and second)
        paired = i % 4 != 3 and not (case == "uneven pairs" and second and i != ROWS - 2)
        answer = "a red apple" if not (case == "uneven answers" and second) else "food and drink " * 4
        images = [Image.new("RGB", (64, 64), (30 * i, 20 * step, 9 * i))] if with_image else []
        rows.append(
            Pair(
                Item(f"animals {i} and {step}", images),
                Item(f"describe {i * 7 + step}") if paired else None,
                (Item(f"green {i}"),) if paired and i == 1 else (),
                "what is this?" if answered or not paired else None,
                answer if answered or (not paired and case != "no answers") else None,
                z=i % 4 < 2,
                target_key=i,
            )
        )
    return rows


def share(collator: Collator, case: str, step: int, rank: int, ranks: int, chunks: int = 1) -> list[Batch]:
    """This rank's share of a step, in chunks."""
    size = ROWS // ranks // chunks
    first = rank * chunks
    return [collator.pairs(pairs(case, step)[i * size : (i + 1) * size]) for i in range(first, first + chunks)]


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up from 0, then linear decay to 0 at the last step."""
    warm, total = config.optim.warmup_steps, config.train.steps
    return config.optim.lr * min(step / warm, (total - step) / (total - warm))


class PlainEngine:
    """PyTorch alone, with the interface of ``crem.train.step.Engine``; it steps once in ``chunks`` times."""

    def __init__(self, model: CremModel, config: RunConfig, chunks: int = 1):
        self.model, self.config, self.chunks, self.held = model, config, chunks, 0
        groups = parameter_groups(model, config.optim.weight_decay)
        self.parameters = [p for g in groups for p in g["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
        self.steps = 0
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, *, embed_only: bool = False) -> CremOutput:
        return self.model(batch, embed_only=embed_only)

    def backward(self, loss: Tensor) -> None:
        (loss / self.chunks).backward()
        self.held += 1

    def step(self) -> None:
        if self.held < self.chunks:
            return
        self.held = 0
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm)
        self.norms.append(float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1


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
