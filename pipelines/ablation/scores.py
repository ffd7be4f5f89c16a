"""From the figures of finished runs to scores by model and seed, and to the rows of the tables. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipelines.ablation.ablation_result import MetricEstimate, ModelRow
from pipelines.ablation.attention_maps import ImageExample
from pipelines.ablation.runs import FinishedRun
from pipelines.ablation.trends import Scores, estimate
from pipelines.ablation.variants import MAP_METRICS, METRICS, key_of
from pipelines.evaluation.evaluation_result import EvaluationResult

__all__ = ["example_maps", "mean_directions", "model_rows", "scores_of"]


def scores_of(finished: Sequence[FinishedRun]) -> Scores:
    """key -> metric -> seed -> percent, of the whole test set."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for done in finished:
        for count, result in done.record.evaluations.items():
            by_metric = scores.setdefault(key_of(done.family, count), {})
            for metric, share in _shares(result):
                by_metric.setdefault(metric, {})[done.run.seed] = 100 * share
    for done in finished:
        if done.maps is not None:
            by_metric = scores.setdefault(key_of(done.family, done.run.variant.counts[0]), {})
            for metric in MAP_METRICS:
                if (share := getattr(done.maps, metric)) is not None:
                    by_metric.setdefault(metric, {})[done.run.seed] = 100 * share
    return scores


def _shares(result: EvaluationResult) -> Iterator[tuple[str, float]]:
    """``variants.METRICS`` that the result has, as shares."""
    answers, cache = result.answers.get("all"), result.cache
    for metric, share in (
        ("retrieval", result.retrieval_mean["all"].precision_at_1),
        ("native", answers.native if answers else None),
        ("compressed", answers.compressed if answers else None),
        ("cache", cache.ratio if cache else None),
    ):
        if share is not None:
            yield metric, share


def model_rows(finished: Sequence[FinishedRun], scores: Scores) -> list[ModelRow]:
    """One row for each key, in the order of the runs."""
    rows: dict[str, ModelRow] = {}
    for done in finished:
        variant = done.run.variant
        for count in done.record.evaluations:
            key = key_of(variant.family, count)
            if key not in rows:
                label = f"{variant.label}, K' = {count}" if variant.nested else variant.label
                metrics = {m: _estimate(scores[key][m]) for m in (*METRICS, *MAP_METRICS) if m in scores[key]}
                rows[key] = ModelRow(key, variant.family, label, count, list(variant.tables), metrics)
    return list(rows.values())


def _estimate(values: Mapping[int, float]) -> MetricEstimate:
    summary = estimate(list(values.values()))
    return MetricEstimate(summary.mean, summary.se, summary.n, dict(values))


def mean_directions(finished: Sequence[FinishedRun]) -> dict[str, dict[str, float]]:
    """key -> task/split -> Precision@1 in percent, mean over seeds: where a difference comes from."""
    values: dict[str, dict[str, list[float]]] = {}
    for done in finished:
        for count, result in done.record.evaluations.items():
            by_name = values.setdefault(key_of(done.family, count), {})
            for task, by_split in result.retrieval.items():
                for split, figures in by_split.items():
                    by_name.setdefault(f"{task}/{split}", []).append(100 * figures.precision_at_1)
    return {key: {name: sum(v) / len(v) for name, v in by_name.items()} for key, by_name in values.items()}


def example_maps(finished: Sequence[FinishedRun]) -> dict[str, list[ImageExample]]:
    """label -> images with their maps, of the first seed that has them, in the paper's order."""
    examples: dict[str, list[ImageExample]] = {}
    for family in ("retrieval_only", "generation_only", "crem"):
        for done in finished:
            if done.family == family and done.maps is not None:
                examples.setdefault(done.run.variant.label, done.maps.examples)
    return examples
