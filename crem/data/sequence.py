"""A prepared sequence: the tokens, positions and image patches of one prompt, ready for a forward.

Preparing runs on the CPU and needs neither the weights nor their device, so it may happen on another thread or in
another process. A sequence is therefore small: the patches stay the bytes of the resized image, an eighth of the
float32 values that the vision tower reads (which hold every frame twice). ``PixelTable`` turns them into those values.

M-RoPE positions are those of the full, unpruned sequence, in numpy. transformers' ``get_rope_index`` needs the model,
loops over samples on the device and refuses a 4-D mask; it is the oracle of the tests.

Shape suffixes: T tokens, P patches, C colour channels, N pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from crem.data.pixel_bytes import PixelBytes
from crem.data.prompts import Prompt, Segment

__all__ = ["CutCount", "Grid", "PixelTable", "PreparedSequence", "rope_positions"]

Grid = tuple[int, int, int]
"""Patches of one image along time, height and width."""


@dataclass(frozen=True, eq=False)
class PreparedSequence:
    """One sequence: tokens with segments, positions and the patches of its images. Pickles compactly."""

    prompt: Prompt
    positions_3T: NDArray[np.int64]
    patches_PCN: NDArray[np.uint8]
    """pixels of the resized images; P may be 0"""
    grids: tuple[Grid, ...]
    """one per image, in the order of the prompt"""
    z: bool = False
    """compression bit: whether the answer must come from the chorus tokens alone"""

    @property
    def tokens(self) -> int:
        """Length T, vision and chorus tokens included."""
        return len(self.prompt.input_ids)

    @property
    def chorus_tokens(self) -> int:
        """Tokens that the embedding is pooled over."""
        return int((self.prompt.segments == Segment.U).sum())


@dataclass(frozen=True)
class CutCount:
    """How many sequences lost the end of a text to its limit: an embedding says nothing of what was cut."""

    sequences: int = 0
    cut: int = 0
    """Those of which a text was cut."""
    longest: int = 0
    """Tokens of the longest text, before any was cut."""

    @classmethod
    def of(cls, sequences: Iterable[PreparedSequence]) -> CutCount:
        """The count over some sequences."""
        prompts = [s.prompt for s in sequences]
        cut = sum(p.cut_texts > 0 for p in prompts)
        return cls(len(prompts), cut, max((p.longest_text for p in prompts), default=0))

    def __add__(self, other: CutCount) -> CutCount:
        return CutCount(self.sequences + other.sequences, self.cut + other.cut, max(self.longest, other.longest))

    def sentence(self, what: str, limit: int) -> str | None:
        """For a person to read, as ``3 of 10 items …``; ``None`` where nothing was cut."""
        if not self.cut:
            return None
        return (
            f"{self.cut:,} of {self.sequences:,} {what} lost the end of a text, which is cut to {limit:,} tokens "
            f"(model.prompt.max_text_tokens); the longest had {self.longest:,}"
        )


class PixelTable:
    """The float32 value that an image processor gives each byte of each channel: one table instead of arithmetic.

    The table is filled by the processor itself, so its values are exact.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        factor = processor.patch_size * processor.merge_size
        side = factor * -(-16 // factor)  # at least 16 x 16 pixels, which show all 256 bytes
        ramp = np.arange(side * side, dtype=np.int64).reshape(side, side, 1) % 256
        image = Image.fromarray(np.repeat(ramp, 3, axis=2).astype(np.uint8))
        bytes_PCN, _ = self.patches([image], do_resize=False)
        values = processor(images=[image], do_resize=False, return_tensors="np")["pixel_values"]
        values_PCN = self._frames(values)[:, :, 0]
        self._table = np.empty((bytes_PCN.shape[1], 256), dtype=np.float32)
        for channel, row in enumerate(self._table):
            row[bytes_PCN[:, channel]] = values_PCN[:, channel]

    def patches(self, images: list[Image.Image], **options: Any) -> tuple[NDArray[np.uint8], tuple[Grid, ...]]:
        """Bytes [P, C, N] of the resized images, and their grids; ``options`` go to the image processor."""
        if not images:
            return np.empty((0, 3, self.processor.patch_size**2), dtype=np.uint8), ()
        out = self.processor(images=images, do_rescale=False, do_normalize=False, return_tensors="np", **options)
        patches_PCN = self._frames(out["pixel_values"])[:, :, 0].astype(np.uint8)
        return patches_PCN, tuple((int(t), int(h), int(w)) for t, h, w in out["image_grid_thw"])

    def values(self, patches_PCN: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the vision tower reads: float32 [P, C * frames * N], each frame the same."""
        count, channels, pixels = patches_PCN.shape
        out = np.empty((count, channels, self.processor.temporal_patch_size, pixels), dtype=np.float32)
        for channel, row in enumerate(self._table):
            out[:, channel] = row[patches_PCN[:, channel]][:, None]
        return out.reshape(count, channels * out.shape[2] * pixels)

    def as_bytes(self, patches_PCN: NDArray[np.uint8]) -> PixelBytes:
        """What becomes ``values`` on the device."""
        table_CV = torch.from_numpy(self._table)
        return PixelBytes(torch.from_numpy(patches_PCN), table_CV, self.processor.temporal_patch_size)

    def _frames(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[P, C, frames, N]"""
        return pixel_values.reshape(len(pixel_values), 3, self.processor.temporal_patch_size, -1)


def rope_positions(is_image_T: NDArray[np.bool_], grids: Sequence[Grid], merge_size: int) -> NDArray[np.int64]:
    """M-RoPE positions (time, height, width) of one sequence; int64 [3, T] (method.md §3).

    Text advances all three by one; an image of h x w merged patches fills a plane and advances by max(h, w).

    Args:
        is_image_T: True at vision tokens (not at their start and end tokens).
        grids: (t, h, w) in patches, one per image.
        merge_size: patches per token along each side.
    """
    positions = np.empty((3, len(is_image_T)), dtype=np.int64)
    at = here = 0
    for t, h, w in grids:
        rows, columns = h // merge_size, w // merge_size
        start = at + int(np.argmax(is_image_T[at:]))
        positions[:, at:start] = here + np.arange(start - at)
        here += start - at
        plane = np.indices((t, rows, columns)).reshape(3, -1)
        at = start + plane.shape[1]
        assert is_image_T[start:at].all(), "fewer vision tokens than the image grids need"
        positions[:, start:at] = here + plane
        here += max(rows, columns)
    assert not is_image_T[at:].any(), "more vision tokens than image grids"
    positions[:, at:] = here + np.arange(len(is_image_T) - at)
    return positions
