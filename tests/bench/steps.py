"""What the benchmarks of the training step share: a model, rows of uneven length, an engine that only accumulates."""

from __future__ import annotations

import random

import torch
from PIL import Image
from torch import Tensor

from crem.config import RunConfig, load_config
from crem.data.collator import Batch, Collator
from crem.data.items import Item, TrainingExample
from crem.model.build import build_model
from crem.model.crem import CremModel, CremOutput

__all__ = ["Accumulating", "build", "rows"]

CAPTION = "a small red fox sits beside green trees and looks at the many animals of this old quiet forest"


def build(width: int, side: int, device: str, *, max_text_tokens: int = 1024) -> tuple[CremModel, Collator, RunConfig]:
    """A model of micro's shape at a hidden size, for images of up to ``side`` x ``side``, trained with both losses."""
    limits = f"model.image={{min_pixels: 256, max_pixels: {side**2}}}"
    overrides = [f"model.scratch.hidden_size={width}", f"model.scratch.intermediate_size={2 * width}", limits]
    both = ["model.chorus_tokens=4", "loss.alpha_r=1", "loss.alpha_g=0.3", "loss.compression_probability=0.5"]
    config = load_config("micro-base", [*overrides, *both, f"model.prompt.max_text_tokens={max_text_tokens}"])
    model, collator = build_model(config.model, texts=[CAPTION, "what is this?"] * 8)
    return model.to(device).train(), collator, config


def rows(
    count: int, side: int, words: tuple[int, int], *, answered: float = 1.0, seed: int = 0
) -> list[TrainingExample]:
    """``count`` retrieval rows: an image with a question for a share of them, and a caption of so many words."""
    draw = random.Random(seed)
    images = [Image.effect_noise((side, side), 90).convert("RGB") for _ in range(min(count, 64))]

    def text() -> str:
        return " ".join(draw.choices(CAPTION.split(), k=draw.randint(*words)))

    made = []
    for i in range(count):
        question, answer = ("what is this?", text()) if draw.random() < answered else (None, None)
        image = images[i % len(images)].rotate(90 * (i // len(images) % 4))
        query, target = Item(text() if i % 2 else None, [image]), Item(f"{text()} {i}")
        made.append(TrainingExample(query, target, (), question, answer, z=draw.random() < 0.5, target_key=i))
    return made


class Accumulating:
    """An engine (``crem.train.step.Engine``) that adds gradients up and takes no step."""

    def __init__(self, model: CremModel):
        self.model = model
        for parameter in model.parameters():  # held throughout, as by any accumulation
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch, *, embed_only: bool = False) -> CremOutput:
        return self.model(batch, embed_only=embed_only)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass
