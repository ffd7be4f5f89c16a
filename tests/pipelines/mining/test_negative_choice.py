"""The search against all pairs compared one by one, and the rules of the choice as properties."""

from __future__ import annotations

import numpy as np
import pytest

from crem.config import MineConfig, load_config
from crem.errors import ConfigError
from pipelines.mining.negative_choice import choose, threshold, top_candidates


def settings(*overrides: str) -> MineConfig:
    return load_config("micro", [f"mine.{override}" for override in overrides]).mine


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def oracle(queries: np.ndarray, targets: np.ndarray, contents: np.ndarray, forbidden: list, last: int) -> list:
    """All pairs, one by one."""
    found = []
    for query, keys in zip(queries, forbidden, strict=True):
        scored = [
            (-float(np.float32(query @ target)), number)
            for number, target in enumerate(targets)
            if contents[number] not in set(keys.tolist())
        ]
        found.append([number for _, number in sorted(scored)[:last]])
    return found


@pytest.mark.parametrize(("targets", "last", "block"), [(500, 20, 64), (37, 100, 10), (300, 1, 300), (129, 129, 7)])
def test_the_nearest_are_those_of_all_pairs_in_any_blocks(targets: int, last: int, block: int) -> None:
    rng = np.random.default_rng(targets)
    # small whole numbers: products are exact, and many are equal
    queries_ND = rng.integers(-2, 3, (300, 6)).astype(np.float32)
    targets_TD = rng.integers(-2, 3, (targets, 6)).astype(np.float32)
    contents = rng.integers(0, targets // 2 + 1, targets)
    forbidden = [np.unique(rng.integers(0, targets // 2 + 1, rng.integers(0, 9))) for _ in range(300)]
    found = None
    for start in range(0, targets, block):
        piece = slice(start, start + block)
        numbers = np.arange(targets)[piece]
        found = top_candidates(queries_ND, targets_TD[piece], numbers, contents[piece], forbidden, last, found)
    assert found is not None
    expected = oracle(queries_ND, targets_TD, contents, forbidden, last)
    for i, numbers in enumerate(expected):
        row = found.numbers_NL[i]
        assert row[: len(numbers)].tolist() == numbers and set(row[len(numbers) :].tolist()) <= {-1}
        np.testing.assert_array_equal(found.scores_NL[i, : len(numbers)], queries_ND[i] @ targets_TD[numbers].T)
        assert np.isneginf(found.scores_NL[i, len(numbers) :]).all()


def test_a_query_whose_targets_are_all_forbidden_finds_none() -> None:
    vectors = unit(np.random.default_rng(0), 5, 4)
    found = top_candidates(vectors[:1], vectors, np.arange(5), np.arange(5), [np.arange(5)], 3)
    assert found.numbers_NL.tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_keeps_its_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = int(rng.integers(1, 12))
    last = first + int(rng.integers(3, 40))
    config = settings(
        f"ranks=[{first},{last}]",
        f"max_ratio={rng.choice([0.8, 0.95, 1.0])}",
        f"margin={rng.choice([0.0, 0.1])}",
        f"negatives={rng.integers(1, 4)}",
        f"pick={rng.choice(['nearest', 'sample'])}",
    )
    candidates = int(rng.integers(0, 60))
    numbers = np.arange(candidates)
    if candidates:
        numbers[int(rng.integers(candidates)) :] = -1
    scores = np.sort(rng.uniform(-1, 1, candidates).astype(np.float32))[::-1]
    scores[numbers < 0] = -np.inf
    contents = rng.integers(0, 20, candidates)
    positive = float(rng.uniform(-1, 1))
    places, dropped = choose(numbers, scores, contents, positive, int(rng.integers(-(2**63), 2**63)), config)
    limit = threshold(positive, config)
    assert limit <= positive - config.margin + 1e-9 and limit <= positive
    window = [p for p in range(candidates) if first <= p + 1 <= last and numbers[p] >= 0]
    allowed = [p for p in window if scores[p] <= limit]
    assert dropped == len(window) - len(allowed)
    assert set(places) <= set(allowed) and places == sorted(places)
    assert len({contents[p] for p in places}) == len(places)
    assert len(places) == min(config.negatives, len({contents[p] for p in allowed}))
    nearest = list({contents[p]: p for p in reversed(allowed)}.values())
    if config.pick == "nearest":
        assert places == sorted(nearest)[: config.negatives]


def test_the_rule_of_nv_retriever() -> None:
    """A positive at 0.8: 95 % is 0.76."""
    scores = np.array([0.9, 0.79, 0.7601, 0.7599, 0.5], np.float32)
    assert choose(np.arange(5), scores, np.arange(5), 0.8, 1, settings("negatives=2")) == ([3, 4], 3)
    assert choose(np.arange(5), scores, np.arange(5), 0.8, 1, settings("negatives=2", "margin=0.2")) == ([4], 4)
    shifted = settings("negatives=2", "max_ratio=1", "ranks=[3,4]")
    assert choose(np.arange(5), scores, np.arange(5), 0.8, 1, shifted) == ([2, 3], 0)


def test_below_zero_the_limit_stays_below_the_positive() -> None:
    assert threshold(-0.2, settings()) == pytest.approx(-0.21)
    assert threshold(0.5, settings("max_ratio=1")) == 0.5


def test_a_sample_depends_on_row_and_seed_alone() -> None:
    scores = np.linspace(0.5, 0.1, 100).astype(np.float32)

    def sample(row_id: int, seed: int) -> list[int]:
        config = settings("negatives=5", "pick=sample", f"seed={seed}")
        return choose(np.arange(100), scores, np.arange(100), 0.9, row_id, config)[0]

    assert sample(-7, 0) == sample(-7, 0) and len(sample(-7, 0)) == 5
    assert sample(-7, 0) != sample(8, 0) and sample(-7, 0) != sample(-7, 1)


@pytest.mark.parametrize("ranks", ["[0,5]", "[9,3]", "[10,11]"])
def test_a_window_that_cannot_hold_them_is_refused(ranks: str) -> None:
    with pytest.raises(ConfigError, match="mine.ranks"):
        settings(f"ranks={ranks}", "negatives=4")
