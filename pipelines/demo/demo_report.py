"""The result of ``crem demo``, the content of ``report.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from crem.config import RunConfig
from pipelines.embedding.output import EmbedManifest
from pipelines.evaluation.evaluation_result import EvaluationResult
from pipelines.reports.training_page import MetricEntry
from pipelines.search.index_dataset import IndexSummary
from pipelines.tables.manifest import PrepareManifest
from pipelines.training.run_folder import TrainResult

__all__ = ["Chat", "Check", "DemoReport", "Search", "SearchHit", "ServeReport"]

FORMAT = 1
_COUNTS = {"rows_in", "rows_out", "rejected", "filtered", "images"}
"""Of the manifest of prepared tables."""


@dataclass(frozen=True)
class Check:
    """A promise of the demo: ``value`` is at least ``at_least``."""

    value: float
    at_least: float
    kept: bool


@dataclass(frozen=True)
class SearchHit:
    """An indexed image near a query."""

    id: int
    uri: str | None
    score: float


@dataclass(frozen=True)
class Search:
    """A text that was embedded by the server, and the nearest images."""

    query: str
    hits: list[SearchHit]


@dataclass(frozen=True)
class Chat:
    """A question about an image, answered by the server in both modes."""

    question: str
    expected: str
    image: int
    """image id"""
    native: str
    native_s: float
    compressed: str
    compressed_s: float


@dataclass(frozen=True)
class ServeReport:
    """What the server answered over HTTP."""

    seconds_until_ready: float
    searches: list[Search]
    embedding_request_s: float
    """median of the searches"""
    chats: list[Chat]


@dataclass(frozen=True)
class DemoReport:
    """All that the demo did."""

    config: RunConfig
    checks: dict[str, Check]
    prepare: PrepareManifest
    train: TrainResult
    curves: list[MetricEntry]
    """entries of ``metrics.jsonl`` of the short training"""
    embed: EmbedManifest
    index: IndexSummary
    evaluation: EvaluationResult
    """of the shipped model"""
    short: EvaluationResult
    """of the model trained just now"""
    untrained: EvaluationResult
    serve: ServeReport
    timings_s: dict[str, float]
    """by stage, and ``total``"""
    peak_memory_gib: float

    def to_json(self) -> dict[str, object]:
        tree = {"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        tree["config"] = self.config.model_dump(mode="json")
        tree["prepare"] = self.prepare.model_dump(include=_COUNTS)
        tree["train"] = {key: value for key, value in asdict(self.train).items() if key != "model"}
        tree["embed"] = self.embed.model_dump(mode="json", exclude={"format", "model"})
        tree["index"] = self.index.model_dump(mode="json", exclude={"format", "model"})
        tree["checks"] = {name: asdict(check) for name, check in self.checks.items()}
        tree["evaluation"] = replace(self.evaluation, model=None).to_json()
        for name in ("short", "untrained"):
            full = getattr(self, name).to_json()
            tree[name] = {key: full[key] for key in ("fingerprint", "retrieval", "answers", "cache")}
        return tree | {"serve": asdict(self.serve)}
