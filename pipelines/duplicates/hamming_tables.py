"""Keys under which every pair of 64-bit hashes within a few bits of each other meets, by the pigeonhole principle.

The 64 bits are cut into blocks. Hashes that differ in ``bits`` places agree on all blocks but ``bits`` at least, so
each choice of ``blocks - bits`` blocks is one table and its blocks one key (Manku, Jain and Das Sarma, "Detecting
near-duplicates for web crawling", WWW 2007). More blocks make longer keys and more tables; the number of hashes
decides.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

__all__ = ["hamming_keys", "hamming_tables"]

_BUCKET = 256
"""Hashes expected under one key at most, were they evenly spread; compared pairwise, as arrays."""
_TABLES = 100
"""Tables at most: each copies every signature once."""


def hamming_tables(count: int, bits: int) -> list[int]:
    """Bit masks of the tables for ``count`` hashes and a distance of ``bits``."""
    best = _masks(bits + 1, bits)
    for blocks in range(bits + 2, 65):
        if count / 2 ** min(mask.bit_count() for mask in best) <= _BUCKET or comb(blocks, bits) > _TABLES:
            break
        best = _masks(blocks, bits)
    return best


def _masks(blocks: int, bits: int) -> list[int]:
    edges = [round(64 * i / blocks) for i in range(blocks + 1)]
    masks = [((1 << (high - low)) - 1) << low for low, high in pairwise(edges)]
    return [sum(chosen) for chosen in combinations(masks, blocks - bits)]


def hamming_keys(hashes: NDArray[np.uint64], masks: list[int]) -> NDArray[np.int64]:
    """[tables, N] keys of the hashes [N] under each table; keys of two tables are never equal but by chance."""
    keys = np.empty((len(masks), len(hashes)), np.uint64)
    for table, mask in enumerate(masks):
        # splitmix64's finaliser: spreads the masked bits evenly over the keys, so over partitions
        mixed = (hashes & np.uint64(mask)) + np.uint64((table + 1) * 0x9E3779B97F4A7C15 % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys[table] = mixed ^ (mixed >> np.uint64(31))
    return keys.view(np.int64)
