"""What an index of vectors needs: bytes in memory and on storage, hours of a core to build it. Arithmetic.

An inverted file keeps a code for each vector, its address and two factors, and the centres of its cells; searches are
fast while these are in memory. The vectors themselves stay on storage. Building it compares each vector, and the sample
that trains the cells, with all cells of its segment. The constants were fitted to builds of pylance 14 at 100,000 and
400,000 vectors of 128 and 512 dimensions (`tests/bench/README.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crem.config import IndexConfig

__all__ = ["IndexForecast", "cells_of", "forecast_index"]

_MOST_CELLS = 65_536
_ADDRESS_BYTES = 15
"""Of a vector, beside its code: the address of its row and the factors of its code. Measured."""
_SAMPLE_A_CELL = 256
"""Vectors of the sample that trains the cells. Source: Lance."""
_FLOPS_A_CORE_S = 8.5e9
"""Multiplications and additions, one of each for a component of a vector and a cell. Measured."""


@dataclass(frozen=True)
class IndexForecast:
    """What it takes."""

    kind: str
    """``exact``, or the quantiser."""
    memory_bytes: float
    """Of the inverted file; of an exact index all vectors, which a search reads."""
    core_hours: float
    segments: int
    """Tasks that build it apart from each other."""


def forecast_index(rows: float, dim: int, config: IndexConfig) -> IndexForecast:
    """Forecast ``crem index`` of so many vectors of ``dim`` dimensions."""
    if rows < config.exact_below:
        return IndexForecast("exact", 4.0 * dim * rows, 0.0, 0)
    segments = math.ceil(rows / config.segment_rows)
    each = rows / segments
    cells = cells_of(round(each), config)
    code = dim / 8 if config.quantiser == "IVF_RQ" else dim / 4
    memory = rows * (code + _ADDRESS_BYTES) + segments * cells * 4 * dim
    compared = segments * cells * (each + _SAMPLE_A_CELL * cells)
    return IndexForecast(config.quantiser, memory, 2 * dim * compared / _FLOPS_A_CORE_S / 3600, segments)


def cells_of(rows: int, config: IndexConfig) -> int:
    """Cells of a segment of so many vectors."""
    return min(config.cells or max(1, round(math.sqrt(rows))), _MOST_CELLS, rows)
