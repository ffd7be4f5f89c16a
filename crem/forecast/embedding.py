"""What embedding a corpus needs: accelerator hours, machines, cost, storage. Arithmetic; starts nothing.

Time is tokens over throughput, which is measured or given. A token of the language model is the unit: text, vision and
chorus tokens alike; how many an item has comes from a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["EmbeddingForecast", "EmbeddingNeeds", "ModelSizes", "TokenSample", "forecast_embedding"]


@dataclass(frozen=True)
class ModelSizes:
    """What the stored forms of an item depend on."""

    dim: int
    chorus_tokens: int
    layers: int
    key_value_heads: int
    head_dim: int

    def stored_bytes(self) -> dict[str, int]:
        """Bytes an item, uncompressed, by what ``crem embed`` can store of it."""
        pairs = 2 * self.chorus_tokens * self.layers * self.key_value_heads * self.head_dim  # keys and values
        return {
            "vector fp32": 4 * self.dim,
            "vector fp16": 2 * self.dim,
            "vector int8 (with a scale)": self.dim + 4,
            "vector binary": -(-self.dim // 8),
            f"{self.chorus_tokens} chorus states fp16": 2 * self.chorus_tokens * self.dim,
            f"chorus memory of {self.chorus_tokens} tokens bf16": 2 * pairs,
            f"chorus memory of {self.chorus_tokens} tokens int8 (without scales)": pairs,
        }


@dataclass(frozen=True)
class TokenSample:
    """Tokens of sampled items."""

    items: int
    errors: int
    """Of the items, those that cannot be embedded."""
    mean: float
    """Of an item that can."""
    quantiles: tuple[tuple[int, int], ...]
    """Percent, and tokens of the item at it."""

    @property
    def good(self) -> float:
        """Share of the items that can be embedded."""
        return 1 - self.errors / self.items

    @classmethod
    def of(cls, tokens: Sequence[int], errors: int) -> TokenSample:
        """From the tokens of the items that can be embedded; there is at least one."""
        ordered = sorted(tokens)
        at = tuple((q, ordered[min(len(ordered) - 1, q * len(ordered) // 100)]) for q in (10, 50, 90, 99, 100))
        return cls(len(tokens) + errors, errors, sum(tokens) / len(tokens), at)


@dataclass(frozen=True)
class EmbeddingNeeds:
    """What was asked for."""

    items: int
    tokens_per_s: float
    """Of one accelerator."""
    prepare_s: float
    """Seconds of a core to read and prepare an item."""
    accelerators: int
    price_per_hour: float | None = None
    """Of an accelerator."""
    busy: float = 0.95
    """Share of the time in which accelerators compute."""


@dataclass(frozen=True)
class EmbeddingForecast:
    """What it takes."""

    tokens: float
    accelerator_hours: float
    hours: float
    cores: float
    """That prepare items as fast as the accelerators embed them."""
    cost: float | None
    stored: dict[str, float]
    """Bytes, by form."""


def forecast_embedding(needs: EmbeddingNeeds, sample: TokenSample, sizes: ModelSizes) -> EmbeddingForecast:
    """Forecast a run. Items with an error cost their preparation and nothing else."""
    good = needs.items * sample.good
    tokens = good * sample.mean
    accelerator_s = tokens / needs.tokens_per_s
    hours = accelerator_s / needs.busy / needs.accelerators / 3600
    held = hours * needs.accelerators
    return EmbeddingForecast(
        tokens=tokens,
        accelerator_hours=held,
        hours=hours,
        cores=needs.items * needs.prepare_s / (hours * 3600),
        cost=None if needs.price_per_hour is None else held * needs.price_per_hour,
        stored={name: good * size for name, size in sizes.stored_bytes().items()},
    )
