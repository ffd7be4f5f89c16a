"""Pairs among items of one key: all of them where they are few, bounded work where they are many."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.duplicates.candidate_pairs import ALL_PAIRS, find_pairs, thin_out


class Close:
    """Numbers that differ by less than 1; counts its comparisons."""

    def __init__(self) -> None:
        self.compared = 0

    def near(self, signatures: NDArray[Any], i: NDArray[np.intp], j: NDArray[np.intp]) -> NDArray[np.bool_]:
        self.compared += len(i)
        near: NDArray[np.bool_] = np.abs(signatures[i] - signatures[j]) < 1
        return near

    def finer_keys(self, signatures: NDArray[Any]) -> NDArray[np.int64]:
        return np.stack([np.floor(signatures), np.floor(signatures + 0.5)]).astype(np.int64)


def pairs_of(keys: list[int], values: list[float]) -> set[tuple[int, int]]:
    found = find_pairs(np.array(keys), np.array(values), Close())
    return set(zip(found.first.tolist(), found.second.tolist(), strict=True))


def test_pairs_are_those_of_equal_keys_that_are_near() -> None:
    assert pairs_of([1, 1, 1, 2, 2, 3, 4, 4], [0, 0.5, 5, 0, 0.5, 0.5, 1, 9]) == {(0, 1), (3, 4)}
    assert pairs_of([], []) == set()


def test_all_pairs_agree_with_a_comparison_of_each_with_each() -> None:
    rng = np.random.default_rng(0)
    keys, values = np.sort(rng.integers(0, 40, 600)), rng.uniform(0, 30, 600)
    found = find_pairs(keys, values, Close())
    expected = {
        (i, j) for i in range(600) for j in range(i + 1, 600) if keys[i] == keys[j] and abs(values[i] - values[j]) < 1
    }
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected and len(expected) > 100


def test_a_million_copies_make_a_star_and_not_all_pairs() -> None:
    count = 1_000_000
    relation = Close()
    found = find_pairs(np.zeros(count, np.int64), np.full(count, 7.0), relation)
    assert found.first.tolist() == [0] * (count - 1) and np.array_equal(found.second, np.arange(1, count))
    assert relation.compared == count - 1 and found.unchecked == 0


def test_many_different_items_of_one_key_get_finer_keys() -> None:
    values = np.random.default_rng(1).permutation(np.arange(20_000) * 10.0)
    values[[5, 17_000]] = 3.0, 3.5  # near to each other alone
    relation = Close()
    found = find_pairs(np.zeros(len(values), np.int64), values, relation)
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == {(5, 17_000)}
    assert found.unchecked == 0 and relation.compared < 20 * len(values)


def test_items_that_stay_behind_are_paired_with_one_that_is_sent() -> None:
    keys = np.sort(np.r_[np.zeros(ALL_PAIRS + 50, np.int64), [1, 1, 1]])
    values = np.r_[np.full(ALL_PAIRS + 48, 2.0), 8.0, 9.5, 2.0, 2.0, 2.0]
    send, near = thin_out(keys, values, Close())
    assert np.flatnonzero(send).tolist() == [0, *range(ALL_PAIRS + 48, ALL_PAIRS + 53)], "few of one key are all sent"
    assert set(near.second.tolist()) == set(np.flatnonzero(~send).tolist()) and set(near.first.tolist()) == {0}
