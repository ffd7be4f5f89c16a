"""From items and training examples to the tensors of one forward.

``Collator.prepare`` makes one ``PreparedSequence`` of an item. A ``Batch`` holds N of them in B rows of T tokens: for
inference one sequence per row, padded on the right, where causal attention never looks; for training all sequences in
one row without padding (a joint batch mixes captions, images and questions of very different lengths), with the plan of
its attention. Neither padding nor neighbours can change a result. An image that occurs several times is stored once and
passes the vision tower once.

Shape suffixes: N sequences, B rows, T tokens, P patches, I distinct images, J places of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
from crem.data.items import Item, TrainingExample
from crem.data.packing import TwoPart, two_part
from crem.data.pixel_bytes import PixelBytes, moved
from crem.data.prompts import PromptBuilder, Segment
from crem.data.sequence import CutCount, Grid, PixelTable, PreparedSequence, rope_positions
from crem.errors import ItemError

__all__ = ["Batch", "Collator"]

_EMPTY = torch.empty(0, dtype=torch.long)
_MAX_ASPECT = 190
"""Long to short side. Qwen2-VL's resize refuses ratios over 200."""


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
    pixel_bytes: PixelBytes | None = None
    """in place of ``pixel_values`` until the batch is moved to its device"""
    image_grid_thw: Tensor | None = None
    """int64 [I, 3]"""
    image_index: Tensor | None = None
    """int64 [J]: which of the I images stands at each place, in the order of the tokens"""
    chorus_tokens: int = 1
    """tokens that each embedding is pooled over"""
    cuts: CutCount = field(default_factory=CutCount)
    """how many of the N sequences lost the end of a text"""
    two_part: TwoPart | None = None
    """how attention is split into calls, where all sequences share one row"""
    queries: Tensor = field(default_factory=_EMPTY.clone)
    """int64 [Q]: sequences that are retrieval queries"""
    targets: Tensor = field(default_factory=_EMPTY.clone)
    """int64 [Q]: sequence of each query's target"""
    negatives: Tensor = field(default_factory=_EMPTY.clone)
    """int64: sequences of the hard negatives of all queries"""
    query_keys: Tensor = field(default_factory=_EMPTY.clone)
    """int64 [Q]: content hash of each query; -1 matches nothing, here and below"""
    target_keys: Tensor = field(default_factory=_EMPTY.clone)
    """int64 [Q]: content hash of each target"""
    negative_keys: Tensor = field(default_factory=_EMPTY.clone)
    """int64: content hash of each hard negative"""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        there: dict[str, Any] = {k: moved(v, device) for k, v in values.items() if isinstance(v, Tensor)}
        if self.pixel_bytes is not None:
            there |= {"pixel_values": self.pixel_bytes.values(device), "pixel_bytes": None}
        return replace(self, **there, two_part=self.two_part.to(device) if self.two_part else None)

    @property
    def packed(self) -> bool:
        """Whether rows hold several sequences."""
        return self.z.shape[0] != self.input_ids.shape[0]

    @property
    def answer_tokens(self) -> Tensor:
        """int64 scalar: tokens of answers, all of which are predicted."""
        return (self.segments == Segment.A).sum()

    @property
    def tokens(self) -> int:
        """Token positions without padding."""
        return int((self.segments != Segment.PAD).sum())

    @property
    def padding_share(self) -> float:
        """Share of the computation spent on padding: of attention with a two-part plan, else of all layers."""
        if self.two_part is not None:
            return self.two_part.padding_share
        return 1 - self.tokens / self.segments.numel()


class Collator:
    """Turns items and training examples into batches for one model's tokenizer, image processor and configuration.

    Needs no weights, may be used by several threads at once, and pickles.
    """

    def __init__(self, tokenizer: Any, processor: Any, chorus_ids: Sequence[int], config: ModelConfig):
        self.prompts = PromptBuilder(tokenizer, chorus_ids, config.prompt)
        self.processor = processor
        self.limits = config.image
        self.template_visible = config.prompt.template_visible
        self.pad_id = tokenizer.pad_token_id
        self.pixels = PixelTable(processor)

    def prepare(
        self,
        item: Item,
        *,
        question: str | None = None,
        answer: str | None = None,
        z: bool = False,
        chorus_tokens: int | None = None,
        augment: Callable[[Image.Image], Image.Image] | None = None,
    ) -> PreparedSequence:
        """``[S V T U]`` of an item, followed by ``[Q]`` and ``[A]`` where a question and an answer are given.

        Args:
            z: compression bit of the sequence.
            chorus_tokens: how many of the K chorus tokens; all of them where None.
            augment: applied to every image after decoding.

        Raises:
            ItemError: the item is empty or one of its images cannot be used.
        """
        patches_PCN, grids = self.pixels.patches(self._images(item, augment))
        merge = self.processor.merge_size
        vision = [t * h * w // merge**2 for t, h, w in grids]
        prompt = self.prompts.prefix(item.text, item.instruction, vision, chorus_tokens, item.image_at)
        if question is not None:
            prompt = prompt + self.prompts.question(question)
        if answer is not None:
            prompt = prompt + self.prompts.answer(answer)
        positions_3T = rope_positions(prompt.input_ids == self.prompts.image_id, grids, merge)
        return PreparedSequence(prompt, positions_3T, patches_PCN, grids, z)

    def items(self, items: Sequence[Item], *, chorus_tokens: int | None = None) -> Batch:
        """A batch of prefixes ``[S V T U]``."""
        return self.pad([self.prepare(item, chorus_tokens=chorus_tokens) for item in items])

    def examples(
        self,
        examples: Sequence[TrainingExample],
        *,
        chorus_tokens: int | None = None,
        augment: float = 0.0,
        flat: bool = True,
    ) -> Batch:
        """A training batch: the queries with their generation turns, their targets, their hard negatives.

        Args:
            chorus_tokens: how many of the K chorus tokens; all of them where None.
            augment: strength of the random changes of images (``crem.data.augment``).
            flat: all sequences in one row without padding; else one per row, padded.
        """
        queries: list[PreparedSequence] = []
        paired: list[int] = []
        targets: list[PreparedSequence] = []
        negatives: list[PreparedSequence] = []
        negative_keys: list[int] = []
        for number, e in enumerate(examples):
            draw = np.random.default_rng(e.seed)
            change = partial(augmented, strength=augment, draw=draw) if augment else None
            make = partial(self.prepare, chorus_tokens=chorus_tokens, augment=change)
            answered = e.answer is not None
            question = e.question if answered else None
            queries.append(make(e.query, question=question, answer=e.answer, z=e.z and answered))
            if e.target is not None:
                paired.append(number)
                targets.append(make(e.target))
                negatives += [make(n) for n in e.negatives]
                negative_keys += e.negative_keys or [-1] * len(e.negatives)
        sequences = queries + targets + negatives
        first_negative = len(queries) + len(targets)
        return replace(
            self.pad(sequences, [list(range(len(sequences)))] if flat else None),
            queries=torch.tensor(paired, dtype=torch.long),
            targets=torch.arange(len(queries), first_negative),
            negatives=torch.arange(first_negative, len(sequences)),
            query_keys=torch.tensor([examples[i].query_key for i in paired], dtype=torch.long),
            target_keys=torch.tensor([examples[i].target_key for i in paired], dtype=torch.long),
            negative_keys=torch.tensor(negative_keys, dtype=torch.long),
        )

    def pad(
        self,
        sequences: Sequence[PreparedSequence],
        layout: list[list[int]] | None = None,
        *,
        pixels_as_bytes: bool = False,
    ) -> Batch:
        """Tensors of the sequences; ``layout`` names the sequences of each row (one per row, in order, by default).

        A single row of several sequences gets the plan of its attention with it.

        Args:
            pixels_as_bytes: leave the pixels as ``PixelBytes``, which ``Batch.to`` turns into values on the device.

        Raises:
            ValueError: the sequences have different numbers of chorus tokens.
        """
        counts = sorted({s.chorus_tokens for s in sequences})
        if len(counts) > 1:
            raise ValueError(f"sequences with {counts} chorus tokens in one batch; prepare all with the same number")
        layout = layout or [[i] for i in range(len(sequences))]
        size = len(layout), max(sum(sequences[i].tokens for i in row) for row in layout)
        input_ids = np.full(size, self.pad_id, dtype=np.int64)
        segments = np.full(size, Segment.PAD, dtype=np.int8)
        sequence_ids = np.full(size, -1, dtype=np.int64)
        positions = np.ones((3, *size), dtype=np.int64)
        placed: list[PreparedSequence] = []
        for row, members in enumerate(layout):
            at = 0
            for sequence in (sequences[i] for i in members):
                here = slice(at, at + sequence.tokens)
                input_ids[row, here] = sequence.prompt.input_ids
                segments[row, here] = sequence.prompt.segments
                sequence_ids[row, here] = len(placed)
                positions[:, row, here] = sequence.positions_3T
                placed.append(sequence)
                at = here.stop
        patches_PCN, grids, image_index = self._distinct_images(placed)
        flat = len(layout) == 1 and len(placed) > 1
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            segments=torch.from_numpy(segments),
            sequence_ids=torch.from_numpy(sequence_ids),
            position_ids=torch.from_numpy(positions),
            z=torch.tensor([s.z for s in placed]),
            pixel_values=None
            if patches_PCN is None or pixels_as_bytes
            else torch.from_numpy(self.pixels.values(patches_PCN)),
            pixel_bytes=self.pixels.as_bytes(patches_PCN) if patches_PCN is not None and pixels_as_bytes else None,
            image_grid_thw=grids,
            image_index=image_index,
            chorus_tokens=counts[0],
            cuts=CutCount.of(placed),
            two_part=two_part(
                [s.prompt.segments for s in placed], [s.z for s in placed], template_visible=self.template_visible
            )
            if flat
            else None,
        )

    def _images(self, item: Item, augment: Callable[[Image.Image], Image.Image] | None) -> list[Image.Image]:
        """The decoded images of an item that the model can take."""
        if not item.images and not (item.text and item.text.strip()):
            raise ItemError("empty_item", "an item needs a text that is not blank, or an image")
        if len(item.images) > self.limits.max_images_per_item:
            raise ItemError(
                "too_many_images",
                f"{len(item.images)} images; the limit is model.image.max_images_per_item="
                f"{self.limits.max_images_per_item}",
            )
        images = [load_image(source, self.limits) for source in item.images]
        if augment is not None:
            images = [augment(image) for image in images]
        return [_within_aspect(image) for image in images]

    def _distinct_images(
        self, sequences: Sequence[PreparedSequence]
    ) -> tuple[NDArray[np.uint8] | None, Tensor | None, Tensor | None]:
        """Bytes [P, C, N] and grids [I, 3] of the distinct images, and which of them stands at each place [J]."""
        known: dict[tuple[Grid, bytes], int] = {}
        patches: list[NDArray[np.uint8]] = []
        index: list[int] = []
        for sequence in sequences:
            at = 0
            for grid in sequence.grids:
                image = sequence.patches_PCN[at : (at := at + grid[0] * grid[1] * grid[2])]
                key = (grid, hashlib.blake2b(image.tobytes(), digest_size=16).digest())
                if key not in known:
                    known[key] = len(patches)
                    patches.append(image)
                index.append(known[key])
        if not index:
            return None, None, None
        grids = torch.tensor([grid for grid, _ in known], dtype=torch.long)
        return np.concatenate(patches), grids, torch.tensor(index, dtype=torch.long)


def _within_aspect(image: Image.Image) -> Image.Image:
    """Centre an extremely long or tall image on white."""
    long, short = max(image.size), min(image.size)
    if long <= _MAX_ASPECT * short:
        return image
    side = -(-long // _MAX_ASPECT)
    size = (long, side) if image.width == long else (side, long)
    canvas = Image.new("RGB", size, (255, 255, 255))
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
