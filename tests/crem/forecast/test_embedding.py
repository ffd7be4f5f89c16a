"""The arithmetic of ``crem plan``."""

from __future__ import annotations

import pytest

from crem.forecast.embedding import EmbeddingNeeds, ModelSizes, TokenSample, forecast_embedding


def test_a_billion_items() -> None:
    sample = TokenSample.of([100] * 50 + [300] * 50, errors=25)
    assert (sample.items, sample.mean, sample.quantiles[0], sample.quantiles[-1]) == (125, 200, (10, 100), (100, 300))
    needs = EmbeddingNeeds(10**9, 40_000, 0.001, 64, price_per_hour=2.0, busy=0.8)
    found = forecast_embedding(needs, sample, ModelSizes(1536, 16, 28, 2, 128))
    assert found.tokens == pytest.approx(0.8 * 10**9 * 200)
    seconds = 0.8 * 10**9 * 200 / 40_000 / 0.8 / 64
    assert found.hours == pytest.approx(seconds / 3600) and found.cores == pytest.approx(10**6 / seconds)
    assert found.accelerator_hours == pytest.approx(64 * found.hours)
    assert found.cost == pytest.approx(2 * found.accelerator_hours)
    assert found.stored["vector fp32"] == pytest.approx(0.8e9 * 6144)
    assert found.stored["vector binary"] == pytest.approx(0.8e9 * 192)
    assert found.stored["16 chorus states fp16"] == pytest.approx(0.8e9 * 16 * 1536 * 2)
    assert found.stored["chorus memory of 16 tokens bf16"] == pytest.approx(0.8e9 * 16 * 28 * 2 * 2 * 128 * 2)
    unpriced = EmbeddingNeeds(10**9, 40_000, 0.001, 64)
    assert forecast_embedding(unpriced, sample, ModelSizes(8, 1, 1, 1, 8)).cost is None
