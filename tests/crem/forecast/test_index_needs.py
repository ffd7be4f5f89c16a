"""The arithmetic of an index in ``crem plan``, against builds that were measured."""

from __future__ import annotations

import pytest

from crem.config import IndexConfig
from crem.forecast.index_needs import forecast_index


@pytest.mark.parametrize(
    ("rows", "dim", "core_s", "row_bytes"), [(100_000, 512, 6.3, 85.4), (400_000, 128, 10.1, 31.7)]
)
def test_builds_that_were_measured(rows: int, dim: int, core_s: float, row_bytes: float) -> None:
    """Seconds are without the second that a build of any size takes."""
    found = forecast_index(rows, dim, IndexConfig())
    assert found.core_hours * 3600 == pytest.approx(core_s, rel=0.15)
    assert found.memory_bytes / rows == pytest.approx(row_bytes, rel=0.03)
    assert (found.kind, found.segments) == ("IVF_RQ", 1)


def test_a_billion_vectors_and_a_few() -> None:
    found = forecast_index(10**9, 1536, IndexConfig())
    assert found.segments == 125 and 200e9 < found.memory_bytes < 220e9
    cells = 2828
    assert found.core_hours == pytest.approx(125 * 2 * 1536 * cells * (8e6 + 256 * cells) / 8.5e9 / 3600, rel=1e-3)
    assert forecast_index(10**9, 1536, IndexConfig(quantiser="IVF_PQ")).memory_bytes > 1.8 * found.memory_bytes
    few = forecast_index(1000, 128, IndexConfig())
    assert (few.kind, few.core_hours, few.memory_bytes) == ("exact", 0, 512_000)
