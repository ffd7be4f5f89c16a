"""Prepared sequences as a few large arrays, which is how they travel.

A sequence has four small arrays. Pickling them one by one took 110 µs a sequence and unpickling 45 µs, half of what
reading and tokenising a short text takes; a few large arrays for a window take 8 µs and 14 µs. Sequences that are
unpacked are views into them, with the values that they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crem.data.prompts import Prompt
from crem.data.sequence import PreparedSequence

__all__ = ["PackedSequences"]


@dataclass(frozen=True)
class PackedSequences:
    """N sequences of T tokens in all, with P patches in all."""

    tokens_N: NDArray[np.int64]
    """of each sequence"""
    patches_N: NDArray[np.int64]
    """of each sequence"""
    images_N: NDArray[np.int64]
    """of each sequence"""
    flags_N3: NDArray[np.int64]
    """cut texts, tokens of the longest text, compression bit"""
    input_ids_T: NDArray[np.int32]
    segments_T: NDArray[np.int8]
    positions_3T: NDArray[np.int32]
    patches_PCN: NDArray[np.uint8] | None
    """``None`` where there is no sequence"""
    grids_I3: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[PreparedSequence]) -> PackedSequences:
        """Pack; token ids and positions are below 2^31."""
        prompts = [sequence.prompt for sequence in sequences]
        empty = np.empty(0, np.int64)
        grids = [grid for sequence in sequences for grid in sequence.grids]
        return cls(
            np.array([len(prompt.input_ids) for prompt in prompts], np.int64),
            np.array([len(sequence.patches_PCN) for sequence in sequences], np.int64),
            np.array([len(sequence.grids) for sequence in sequences], np.int64),
            np.array([(s.prompt.cut_texts, s.prompt.longest_text, s.z) for s in sequences], np.int64).reshape(-1, 3),
            np.concatenate([empty, *(prompt.input_ids for prompt in prompts)]).astype(np.int32),
            np.concatenate([empty, *(prompt.segments for prompt in prompts)]).astype(np.int8),
            np.concatenate([empty.reshape(3, 0), *(s.positions_3T for s in sequences)], axis=1).astype(np.int32),
            np.concatenate([sequence.patches_PCN for sequence in sequences]) if sequences else None,
            np.array(grids, np.int64).reshape(-1, 3),
        )

    def unpack(self) -> list[PreparedSequence]:
        """The sequences."""
        input_ids_T, positions_3T = self.input_ids_T.astype(np.int64), self.positions_3T.astype(np.int64)
        grids = [(t, h, w) for t, h, w in self.grids_I3.tolist()]
        found: list[PreparedSequence] = []
        token = patch = image = 0
        counts = np.stack([self.tokens_N, self.patches_N, self.images_N], axis=1).tolist()
        for (tokens, patches, images), (cut, longest, z) in zip(counts, self.flags_N3.tolist(), strict=True):
            assert self.patches_PCN is not None
            to = slice(token, token + tokens)
            found.append(
                PreparedSequence(
                    Prompt(input_ids_T[to], self.segments_T[to], cut, longest),
                    positions_3T[:, to],
                    self.patches_PCN[patch : patch + patches],
                    tuple(grids[image : image + images]),
                    bool(z),
                )
            )
            token, patch, image = token + tokens, patch + patches, image + images
        return found
