"""CREM's training on one page: rows, a batch, the step, both losses. One process, without Ray and DeepSpeed.

    crem prepare SOURCE --out PREPARED
    python -m crem.train.minimal PREPARED --steps 20

``train_step`` is the one that ``crem train`` makes. A real run adds many devices (``crem.train.optim``), an order of
rows that survives a restart (``crem.data.mixing``), validation and checkpoints (``crem.train.callbacks``).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from crem.config import OptimConfig, load_config
from crem.data.collator import Batch
from crem.data.items import Item, TrainingExample
from crem.model.build import build_model
from crem.model.crem import CremModel, CremOutput
from crem.train.optim import parameter_groups
from crem.train.step import train_step


class AdamWEngine:
    """What a step needs (``TrainEngine``), from PyTorch alone: forward, backward, clip, AdamW at a constant rate."""

    def __init__(self, model: CremModel, config: OptimConfig):
        self.model, self.max_grad_norm = model, config.max_grad_norm
        groups = parameter_groups(model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)

    def __call__(self, batch: Batch, *, embed_only: bool = False) -> CremOutput:
        return self.model(batch, embed_only=embed_only)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(prepared: str, steps: int, *overrides: str) -> list[float]:
    """Train on the folder ``prepared`` and print both losses of every step; returns their weighted sums."""
    config = load_config("micro", overrides)
    draw = random.Random(config.train.seed)

    # A prepared table is plain Parquet (pipelines/tables/schema.py). Rows name their images by id.
    rows = [row for row in read(prepared, "rows") if row["split"].startswith("train")]
    images = {image["id"]: image["bytes"] for image in read(prepared, "images")}

    # The K chorus tokens join the vocabulary here. A model from scratch trains its tokenizer on the rows' texts.
    texts = [text for row in rows for text in (row["query"]["text"], row["question"], row["answer"]) if text]
    model, collator = build_model(config.model, texts=texts, seed=config.train.seed)
    engine = AdamWEngine(model.train(), config.optim)

    losses = []
    for step in range(steps):
        # With z = 1 the answer is generated from the chorus tokens alone, so they must hold what image and text say.
        examples = [
            example(row, images, z=draw.random() < config.loss.compression_probability)
            for row in draw.sample(rows, min(config.train.global_batch, len(rows)))
        ]
        batch = collator.examples(examples)  # [vision, text, chorus, question, answer] of all rows, side by side
        # One forward gives the embeddings for L_r (InfoNCE) and the answers for L_g; then one backward, one update.
        result = train_step(engine, [batch], config.loss, seed=step)
        print(f"step {step + 1:3d}   retrieval {result.retrieval:.3f}   generation {result.generation:.3f}")
        losses.append(result.loss)
    return losses


def read(prepared: str, table: str) -> list[dict[str, Any]]:
    """A prepared table: the parts that the manifest lists, for its folder may also hold those of another version."""
    manifest = json.loads(Path(prepared, "manifest.json").read_text())
    parts = [part for part in pq.read_table(f"{prepared}/{manifest['files']}").to_pylist() if part["table"] == table]
    return [row for part in parts for row in pq.read_table(f"{prepared}/{table}/{part['name']}").to_pylist()]


def example(row: dict[str, Any], images: dict[int, bytes], *, z: bool) -> TrainingExample:
    """A row as the collator takes it: a retrieval pair, a question with its answer, or both."""
    query, target = row["query"], row["target"]
    return TrainingExample(
        query=item(query, images),
        target=item(target, images) if target else None,
        question=row["question"],
        answer=row["answer"],
        z=z,
        # The targets of all other rows are this row's negatives, except for those of equal content.
        query_key=content_key(query),
        target_key=content_key(target) if target else -1,
    )


def item(side: dict[str, Any], images: dict[int, bytes]) -> Item:
    """One side of a row: its text, its images and their places in the text, its embedding instruction."""
    pictures = tuple(images[i] for i in side["images"] or ())
    return Item(side["text"], pictures, side["instruction"], tuple(side["image_at"] or ()))


def content_key(side: dict[str, Any]) -> int:
    """Equal for sides of equal content; never negative, because negative keys match nothing."""
    return abs(hash((side["text"], tuple(side["images"] or ()), tuple(side["image_at"] or ()))))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train CREM in one process, on one page of code.")
    parser.add_argument("prepared", help="folder written by crem prepare")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, e.g. optim.lr=1e-3")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_intermixed_args()
    train(args.prepared, args.steps, *args.overrides)


if __name__ == "__main__":
    main()
