"""``report.html`` of the demo as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pipelines.demo.demo_report import DemoReport
from pipelines.evaluation.evaluation_result import EvaluationResult
from pipelines.reports.charts import BLUE, GREY, INK, LIGHT_GREY, ORANGE, axes, line, svg
from pipelines.reports.pages import data_url, render
from pipelines.reports.training_page import MetricEntry
from pipelines.tables.prepared import PreparedRows

__all__ = ["demo_page"]


def demo_page(report: DemoReport, rows: PreparedRows) -> str:
    """The page; its images come from ``rows``."""
    return render(
        "demo.html.j2",
        r=report,
        e=report.evaluation,
        image=lambda image_id: data_url(rows.image(image_id)),
        curves=_curves(report.curves),
        retrieval=_precision(report.evaluation, report.short, report.untrained),
        answers=_answers(report.evaluation, report.untrained),
    )


def _curves(metrics: Sequence[MetricEntry]) -> Markup:
    """Losses and speed of the short training."""
    figure, panels = axes(3, 10)
    for axis, name, title in zip(
        panels,
        ("retrieval", "generation", "samples_per_s"),
        ("retrieval loss (InfoNCE)", "generation loss (per answer token)", "samples / s"),
        strict=True,
    ):
        line(axis, [(m["step"] or 0, m[name]) for m in metrics])
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylim(bottom=0)
    return svg(figure)


def _precision(shipped: EvaluationResult, short: EvaluationResult, untrained: EvaluationResult) -> Markup:
    """Precision@1 of the three models by task and split."""
    figure, panels = axes(max(1, len(shipped.retrieval)), 10)
    for axis, (task, by_split) in zip(panels, shipped.retrieval.items(), strict=False):
        for shift, result, colour, label in (
            (-0.28, shipped, BLUE, "crem-micro"),
            (0, short, ORANGE, "this run"),
            (0.28, untrained, GREY, "untrained"),
        ):
            values = [100 * result.retrieval[task][split].precision_at_1 for split in by_split]
            _bars(axis, shift, values, 0.26, colour, label, fmt="%.1f")
        axis.set_xticks(range(len(by_split)), [split.replace("_", "\n") for split in by_split], fontsize=7)
        axis.set_title(f"{task.replace('_', ' ')}: Precision@1, %", fontsize=9, color=INK, loc="left")
    panels[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg(figure)


def _answers(shipped: EvaluationResult, untrained: EvaluationResult) -> Markup:
    """Exact match by split, beside the commonest answer and the untrained model."""
    figure, (axis,) = axes(1, 5)
    for shift, name, result, colour, label in (
        (-0.3, "native", shipped, BLUE, "native"),
        (-0.1, "compressed", shipped, ORANGE, "compressed"),
        (0.1, "commonest", shipped, LIGHT_GREY, "commonest answer"),
        (0.3, "native", untrained, GREY, "untrained, native"),
    ):
        values = [100 * getattr(result.answers[split], name) for split in shipped.answers]
        _bars(axis, shift, values, 0.19, colour, label, fmt="%.0f")
    axis.set_xticks(range(len(shipped.answers)), list(shipped.answers), fontsize=8)
    axis.set_title("answers: exact match, %", fontsize=9, color=INK, loc="left")
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg(figure)


def _bars(axis: Any, shift: float, values: Sequence[float], width: float, colour: str, label: str, fmt: str) -> None:
    """One bar for each group, labelled with its value."""
    bars = axis.bar([place + shift for place in range(len(values))], values, width, color=colour, label=label)
    axis.bar_label(bars, fmt=fmt, fontsize=7, color=INK)
