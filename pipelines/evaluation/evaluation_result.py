"""What ``crem evaluate`` finds: the content of ``evaluation.json``, typed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from crem.errors import ConfigError

__all__ = [
    "AnswerExample",
    "AnswerFigures",
    "CacheFigures",
    "EvaluationResult",
    "ExampleContent",
    "ExampleHit",
    "Examples",
    "MeanPrecision",
    "RetrievalExample",
    "RetrievalFigures",
]

FORMAT = 1
"""Of ``evaluation.json``. Files without a format are of this one."""


@dataclass(frozen=True)
class RetrievalFigures:
    """Precision of one task (direction) on one split; shares between 0 and 1."""

    precision_at_1: float
    precision_at_10: float
    chance_at_1: float
    chance_at_10: float
    queries: int
    candidates: int
    """distinct targets of the task in all test splits"""


@dataclass(frozen=True)
class MeanPrecision:
    """Precision@1 and chance as the mean of the tasks that have the split, each with equal weight."""

    precision_at_1: float
    chance_at_1: float
    directions: int


@dataclass(frozen=True)
class AnswerFigures:
    """Exact match of the answers of one split; shares between 0 and 1."""

    native: float
    compressed: float | None
    """None for a model without chorus tokens"""
    commonest: float
    """share that always giving ``commonest_answer`` would get"""
    commonest_answer: str
    questions: int


@dataclass(frozen=True)
class CacheFigures:
    """Keys and values kept per item, mean over the questions."""

    native_bytes: float
    compressed_bytes: float | None
    """None for a model without chorus tokens, as ``ratio``"""
    ratio: float | None


@dataclass(frozen=True)
class ExampleContent:
    """One side of a row."""

    text: str | None
    images: list[int]
    """image ids"""


@dataclass(frozen=True)
class ExampleHit(ExampleContent):
    """A candidate that was retrieved."""

    right: bool


@dataclass(frozen=True)
class RetrievalExample:
    """A query, its target and its best candidates."""

    task: str
    split: str
    query: ExampleContent
    target: ExampleContent
    top: list[ExampleHit]
    """the five best candidates, best first"""
    rank: int
    """place of the target, from 1"""


@dataclass(frozen=True)
class AnswerExample:
    """A question with the answers of both modes."""

    split: str
    question: str
    answer: str
    """the expected one"""
    query: ExampleContent
    native: str
    compressed: str | None
    native_right: bool
    compressed_right: bool


@dataclass(frozen=True)
class Examples:
    """An even spread over the test rows, right or wrong as they come."""

    retrieval: list[RetrievalExample]
    answers: list[AnswerExample]


@dataclass(frozen=True)
class EvaluationResult:
    """All figures of one checkpoint at one chorus count."""

    model: str | None
    """path or URI; None for a model that was evaluated in memory"""
    chorus_tokens: int
    fingerprint: str
    retrieval: dict[str, dict[str, RetrievalFigures]]
    """by task, then by split; the split ``all`` is every query of the task"""
    retrieval_mean: dict[str, MeanPrecision]
    """by split"""
    answers: dict[str, AnswerFigures]
    """by split; empty without questions"""
    cache: CacheFigures | None
    """None without questions"""
    examples: Examples | None = None

    def to_json(self) -> dict[str, object]:
        tree = {"format": FORMAT, **asdict(self)}
        tree["cache"] = tree["cache"] or {}
        return {key: value for key, value in tree.items() if value is not None}

    @classmethod
    def from_json(cls, tree: object) -> EvaluationResult:
        """The result that ``to_json`` wrote.

        Raises:
            ConfigError: another format, or not an evaluation.
        """
        if not isinstance(tree, dict) or tree.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"not an evaluation of format {FORMAT}; run crem evaluate again with this version")
        try:
            return _ADAPTER.validate_python({"model": None, **tree, "cache": tree.get("cache") or None})
        except ValidationError as error:
            raise ConfigError(f"the evaluation is damaged: {error}; run crem evaluate again") from error


_ADAPTER = TypeAdapter(EvaluationResult)
