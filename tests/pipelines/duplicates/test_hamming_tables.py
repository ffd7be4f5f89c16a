"""Two hashes within a few bits of each other share a key, whatever the bits; others seldom do."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.duplicates.hamming_tables import hamming_keys, hamming_tables


@pytest.mark.parametrize("bits", [0, 1, 4, 6, 10])
@pytest.mark.parametrize("count", [100, 10**6, 10**9])
def test_every_near_pair_shares_a_key(bits: int, count: int) -> None:
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**63, 2000, np.uint64) * np.uint64(2) + rng.integers(0, 2, 2000, np.uint64)
    others = hashes.copy()
    for i in range(len(others)):
        for bit in rng.choice(64, rng.integers(0, bits + 1), replace=False):
            others[i] ^= np.uint64(1) << np.uint64(bit)
    masks = hamming_tables(count, bits)
    shared = (hamming_keys(hashes, masks) == hamming_keys(others, masks)).any(axis=0)
    assert shared.all()


def test_tables_grow_with_the_number_of_hashes() -> None:
    sizes = [
        (len(masks), min(mask.bit_count() for mask in masks))
        for masks in (hamming_tables(n, 6) for n in (10**4, 10**6, 10**9))
    ]
    assert sizes == [(7, 9), (28, 16), (84, 21)]


def test_keys_of_different_tables_differ() -> None:
    masks = hamming_tables(10**6, 6)
    keys = hamming_keys(np.zeros(1, np.uint64), masks)
    assert len(np.unique(keys)) == len(masks)
