"""From items and rows to the tensors of one forward.

A ``Sequence`` is one prompt with its pixels. A ``Batch`` holds N of them in B rows of T tokens: for inference one
sequence per row, padded on the right, where causal attention never looks; for training several sequences packed into a
row, which leaves almost no padding (a joint batch mixes captions, pictures and questions of very different lengths).
Neither padding nor neighbours can change a result. Shape suffixes: N sequences, B rows, T tokens, P patches, I images.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crem.config import ModelConfig
from crem.data.augment import augmented
from crem.data.images import load_image
from crem.data.items import Item, Pair
from crem.data.prompts import Prompt, PromptBuilder, Segment
from crem.errors import ItemError
from crem.model.backbone import rope_positions

__all__ = ["Batch", "Collator", "Sequence"]


@dataclass(frozen=True)
class Sequence:
    """One sequence: tokens with segments, positions and the patches of its images."""

    prompt: Prompt
    positions_3T: NDArray[np.int64]
    patches: NDArray[np.float32]
    """[P, channels * temporal * patch * patch]; P may be 0."""
    grids: tuple[tuple[int, int, int], ...]
    z: bool = False


@dataclass
class Batch:
    """Tensors of one forward. Retrieval indices are empty for inference."""

    input_ids: Tensor
    """int64 [B, T]"""
    segments: Tensor
    """int8 [B, T] of ``Segment``"""
    sequence_ids: Tensor
    """int64 [B, T]: which of the N sequences a token belongs to, counted row by row; -1 is padding"""
    position_ids: Tensor
    """int64 [3, B, T]"""
    z: Tensor
    """bool [N]"""
    pixel_values: Tensor | None = None
    """float32 [P, patch length]"""
    image_grid_thw: Tensor | None = None
    """int64 [I, 3]"""
    queries: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """int64 [Q]: sequences that are retrieval queries"""
    candidates: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """int64 [Q + negatives]: sequence of each query's target in the order of ``queries``, then hard negatives"""
    candidate_keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """int64 [Q + negatives]: content of each candidate"""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})

    @property
    def packed(self) -> bool:
        """Whether rows hold several sequences."""
        return self.z.shape[0] != self.input_ids.shape[0]

    @property
    def padding_share(self) -> float:
        """Share of the token positions that hold padding."""
        return float((self.segments == Segment.PAD).float().mean())


class Collator:
    """Turns items and training rows into batches for one model's tokenizer, image processor and configuration."""

    def __init__(self, tokenizer: Any, processor: Any, chorus_ids: SequenceOf[int], config: ModelConfig):
        self.prompts = PromptBuilder(tokenizer, chorus_ids, config.prompt)
        self.processor = processor
        self.limits = config.image
        self.pad_id = tokenizer.pad_token_id
        self._empty = np.empty((0, 3 * processor.temporal_patch_size * processor.patch_size**2), dtype=np.float32)

    def sequence(
        self,
        item: Item,
        *,
        question: str | None = None,
        answer: str | None = None,
        z: bool = False,
        augment: Callable[[Image.Image], Image.Image] | None = None,
    ) -> Sequence:
        """``[S V T U]`` of an item, followed by ``[Q]`` and ``[A]`` where a question and an answer are given.

        Raises:
            ItemError: the item is empty or one of its images cannot be used.
        """
        patches, grids = self._pixels(item, augment)
        merge = self.processor.merge_size
        prompt = self.prompts.prefix(item.text, item.instruction, [t * h * w // merge**2 for t, h, w in grids])
        if question is not None:
            prompt = prompt + self.prompts.question(question)
        if answer is not None:
            prompt = prompt + self.prompts.answer(answer)
        positions = rope_positions(prompt.input_ids == self.prompts.image_id, grids, merge)
        return Sequence(prompt, positions, patches, grids, z)

    def items(self, items: SequenceOf[Item]) -> Batch:
        """A batch of prefixes ``[S V T U]``."""
        return self.pad([self.sequence(item) for item in items])

    def pairs(self, pairs: SequenceOf[Pair], *, augment: float = 0.0) -> Batch:
        """A training batch, packed: the queries with their generation turns, their targets and hard negatives.

        ``augment`` is the strength of the random changes of pictures (``crem.data.augment``).
        """
        sequences: list[Sequence] = []
        queries: list[int] = []
        targets: list[tuple[Sequence, int]] = []
        negatives: list[tuple[Sequence, int]] = []
        for number, p in enumerate(pairs):
            draw = np.random.default_rng(p.seed)
            change = partial(augmented, strength=augment, draw=draw) if augment else None
            question = p.question if p.answer is not None else None
            sequences.append(
                self.sequence(
                    p.query, question=question, answer=p.answer, z=p.z and p.answer is not None, augment=change
                )
            )
            if p.target is not None:
                queries.append(number)
                targets.append((self.sequence(p.target, augment=change), p.target_key))
                negatives += [(self.sequence(n, augment=change), -1) for n in p.negatives]
        candidates = list(range(len(sequences), len(sequences) + len(targets) + len(negatives)))
        sequences += [sequence for sequence, _ in targets + negatives]
        layout = _packed(sequences)
        placed = {sequence: at for at, sequence in enumerate(i for row in layout for i in row)}
        return replace(
            self.pad(sequences, layout),
            queries=torch.tensor([placed[i] for i in queries], dtype=torch.long),
            candidates=torch.tensor([placed[i] for i in candidates], dtype=torch.long),
            candidate_keys=torch.tensor([key for _, key in targets + negatives], dtype=torch.long),
        )

    def pad(self, sequences: SequenceOf[Sequence], layout: list[list[int]] | None = None) -> Batch:
        """Tensors of the sequences; ``layout`` names the sequences of each row (one per row, in order, by default)."""
        layout = layout or [[i] for i in range(len(sequences))]
        size = len(layout), max(sum(len(sequences[i].prompt.input_ids) for i in row) for row in layout)
        input_ids = np.full(size, self.pad_id, dtype=np.int64)
        segments = np.full(size, Segment.PAD, dtype=np.int8)
        sequence_ids = np.full(size, -1, dtype=np.int64)
        positions = np.ones((3, *size), dtype=np.int64)
        placed: list[Sequence] = []
        for row, members in enumerate(layout):
            at = 0
            for sequence in (sequences[i] for i in members):
                here = slice(at, at + len(sequence.prompt.input_ids))
                input_ids[row, here] = sequence.prompt.input_ids
                segments[row, here] = sequence.prompt.segments
                sequence_ids[row, here] = len(placed)
                positions[:, row, here] = sequence.positions_3T
                placed.append(sequence)
                at = here.stop
        grids = [grid for s in placed for grid in s.grids]
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            segments=torch.from_numpy(segments),
            sequence_ids=torch.from_numpy(sequence_ids),
            position_ids=torch.from_numpy(positions),
            z=torch.tensor([s.z for s in placed]),
            pixel_values=torch.from_numpy(np.concatenate([s.patches for s in placed if s.grids])) if grids else None,
            image_grid_thw=torch.tensor(grids, dtype=torch.long) if grids else None,
        )

    def _pixels(
        self, item: Item, augment: Callable[[Image.Image], Image.Image] | None = None
    ) -> tuple[NDArray[np.float32], tuple[tuple[int, int, int], ...]]:
        if not item.images and not (item.text and item.text.strip()):
            raise ItemError("empty_item", "an item needs a text that is not blank, or an image")
        if len(item.images) > self.limits.max_images_per_item:
            raise ItemError(
                "too_many_images",
                f"{len(item.images)} images; the limit is model.image.max_images_per_item="
                f"{self.limits.max_images_per_item}",
            )
        if not item.images:
            return self._empty, ()
        images = [load_image(source, self.limits) for source in item.images]
        if augment is not None:
            images = [augment(image) for image in images]
        images = [_within_aspect(image) for image in images]
        out = self.processor(images=images, return_tensors="np")
        grids = tuple((int(t), int(h), int(w)) for t, h, w in out["image_grid_thw"])
        return out["pixel_values"].astype(np.float32, copy=False), grids


def _packed(sequences: SequenceOf[Sequence]) -> list[list[int]]:
    """First-fit decreasing: rows as long as the longest sequence, each filled with sequences that fit."""
    lengths = [len(s.prompt.input_ids) for s in sequences]
    order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            rows.append([])
            room.append(lengths[order[0]])
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def _within_aspect(image: Any, limit: int = 190) -> Any:
    """Centre a sliver on white: Qwen2-VL's resize refuses sides of a ratio over 200."""
    long, short = max(image.size), min(image.size)
    if long <= limit * short:
        return image
    size = (long, -(-long // limit)) if image.width == long else (-(-long // limit), long)
    canvas = Image.new("RGB", size, (255, 255, 255))
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
