"""MaxSim against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.search.late_interaction import max_sim


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def plain(query_QD: np.ndarray, states_KD: np.ndarray) -> float:
    """In words: for each state of the query the best inner product, averaged."""
    return sum(max(float(q @ s) for s in states_KD) for q in query_QD) / len(query_QD)


@pytest.mark.parametrize(("queries", "states"), [(4, 4), (1, 7), (5, 1)])
def test_max_sim_is_the_mean_of_the_best_inner_products(queries: int, states: int) -> None:
    query, candidates = unit(queries, 16), unit(9, states, 16, seed=1)
    found = max_sim(query, candidates)
    assert found.shape == (9,) and found.dtype == np.float32
    assert found == pytest.approx([plain(query, one) for one in candidates], abs=1e-6)
    assert max_sim(query.astype(np.float16), candidates.astype(np.float16)) == pytest.approx(found, abs=2e-3)


def test_an_item_is_nearest_to_itself_and_what_a_candidate_has_beyond_costs_nothing() -> None:
    query = unit(3, 8)
    more = np.concatenate([unit(5, 8, seed=2), query])
    assert max_sim(query, np.stack([more]))[0] == pytest.approx(1, abs=1e-6)
    assert max_sim(more, np.stack([query]))[0] < 0.9, "it is not symmetric"
