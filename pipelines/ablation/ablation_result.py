"""The result of ``crem ablate``: the content of ``ablation.json``, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from crem.errors import ConfigError
from pipelines.ablation.attention_maps import MapFigures
from pipelines.ablation.trends import Estimate, Trend
from pipelines.ablation.variants import MAP_METRICS, METRICS

__all__ = ["AblationResult", "MetricEstimate", "ModelRow", "PaperFigures", "RunCounts", "RunSeconds"]

FORMAT = 1
"""Of ``ablation.json``. Files without a format are of this one."""


@dataclass(frozen=True)
class RunCounts:
    """Runs of the ablation."""

    finished: int
    wanted: int


@dataclass(frozen=True)
class RunSeconds:
    """How long one run took."""

    train: float
    evaluate: float


@dataclass(frozen=True)
class MetricEstimate(Estimate):
    """One metric of a model in percent, over its seeds."""

    values: dict[int, float]
    """by seed; that of the backbone is ``trends.NO_SEED``"""


@dataclass(frozen=True)
class ModelRow:
    """All figures of a model at one chorus count."""

    key: str
    """``variants.key_of``"""
    family: str
    label: str
    chorus_tokens: int
    tables: list[str]
    """of the paper in which it stands"""
    metrics: dict[str, MetricEstimate]
    """of ``variants.METRICS`` and ``MAP_METRICS`` those that it has"""


@dataclass(frozen=True)
class PaperFigures:
    """What the paper measured, in percent, by key and metric."""

    source: str
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True)
class AblationResult:
    """Everything that is finished, beside the paper."""

    config: dict[str, JsonValue]
    """the whole configuration of the ablation as JSON, so that files of earlier versions stay readable"""
    seeds: list[int]
    runs: RunCounts
    seconds: dict[str, RunSeconds]
    """by name of the run"""
    rows: list[ModelRow]
    paper: PaperFigures
    trends: list[Trend]
    map_trends: list[Trend]
    maps_by_layer: dict[str, list[MapFigures]]
    """by name of the run"""
    directions: dict[str, dict[str, float]]
    """by key: Precision@1 in percent by ``task/split``, mean over seeds"""

    def setting(self, section: str, name: str) -> Any:
        """One setting of the configuration."""
        values = self.config[section]
        assert isinstance(values, Mapping), section
        return values[name]

    def to_json(self) -> dict[str, object]:
        """``rows`` have their metrics beside their other fields, as the file always had."""
        tree = asdict(self)
        tree["rows"] = [row | row.pop("metrics") for row in tree["rows"]]
        return {"format": FORMAT, **tree}

    @classmethod
    def from_json(cls, tree: object) -> AblationResult:
        """The result that ``to_json`` wrote.

        Raises:
            ConfigError: another format, or not the result of an ablation.
        """
        if not isinstance(tree, dict) or tree.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"not the result of an ablation of format {FORMAT}; run crem ablate --report again")
        names = (*METRICS, *MAP_METRICS)
        try:
            rows = [{**row, "metrics": {name: row[name] for name in names if name in row}} for row in tree["rows"]]
            return _ADAPTER.validate_python({**tree, "rows": rows})
        except (KeyError, TypeError, ValidationError) as error:
            raise ConfigError(f"the result is damaged: {error}; run crem ablate --report again") from error


_ADAPTER = TypeAdapter(AblationResult)
