"""``report.html`` of a training run: its curves, configuration and data, as one self-contained page.

It is drawn again while the run goes on, and at its end, also when the run failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Protocol

from markupsafe import Markup

from crem.config import RunConfig
from pipelines.reports.charts import BLUE, GREEN, INK, ORANGE, axes, line, svg
from pipelines.reports.pages import render
from pipelines.tables.storage import Folder

__all__ = ["MetricEntry", "MixRow", "TrainedModel", "write_training_report"]

MetricEntry = Mapping[str, float | None]
"""One entry of ``metrics.jsonl``: ``step`` and the metrics by name; None is a number that was not finite."""

_COLUMNS = 3
_Curve = tuple[str, str, str]

_CHARTS: tuple[tuple[str, tuple[_Curve, ...], float], ...] = (
    # title, curves (metric, label, colour), factor of the values
    ("loss", (("loss", "training", BLUE), ("validation/loss", "held out", ORANGE)), 1),
    ("retrieval loss, InfoNCE", (("retrieval", "training", BLUE), ("validation/retrieval", "held out", ORANGE)), 1),
    (
        "generation loss, per answer token",
        (
            ("generation", "training", BLUE),
            ("validation/generation_native", "held out, native", ORANGE),
            ("validation/generation_compressed", "held out, compressed", GREEN),
        ),
        1,
    ),
    ("held out: in-batch Precision@1, %", (("validation/precision_at_1", "", ORANGE),), 100),
    ("embeddings: uniformity", (("uniformity", "", BLUE),), 1),
    ("embeddings: alignment", (("alignment", "", BLUE),), 1),
    ("learning rate", (("lr", "", BLUE),), 1),
    ("gradient norm before clipping", (("grad_norm", "", BLUE),), 1),
    ("temperature", (("temperature", "", BLUE),), 1),
    ("samples / s", (("samples_per_s", "", BLUE),), 1),
    ("thousand tokens / s", (("tokens_per_s", "", BLUE),), 1e-3),
    ("model-FLOPs utilisation, %", (("flops_utilisation", "", BLUE),), 100),
    ("share of padding, %", (("padding_share", "", BLUE),), 100),
    ("share of time waiting for rows, %", (("waiting_share", "", BLUE),), 100),
    ("answer tokens in the batch", (("answer_tokens", "", BLUE),), 1),
)
_BELOW_ZERO = {"uniformity"}
"""The one metric that lies below zero."""


class MixRow(Protocol):
    """Rows of one source and task: how many are trained on, have a target, have an answer, are held out."""

    @property
    def source(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def answers(self) -> int: ...
    @property
    def held_out(self) -> int: ...


class TrainedModel(Protocol):
    """The model of a finished run."""

    @property
    def parameters(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


def write_training_report(
    run: Folder,
    config: RunConfig,
    metrics: Sequence[MetricEntry],
    *,
    mix: Sequence[MixRow],
    state: str,
    seconds: float,
    result: TrainedModel | None,
) -> None:
    """Write the page.

    Args:
        mix: largest first; the page has the first 60.
        state: ``running``, ``complete`` or ``failed: …``.
        seconds: since this start of the run.
        result: None before the run has finished.
    """
    sections = ("model", "data", "loss", "optim", "train")
    validated = [m for m in metrics if m.get("validation/loss") is not None]
    page = render(
        "training.html.j2",
        name=run.name,
        uri=run.uri,
        config=config,
        sections={name: _settings(getattr(config, name).model_dump(mode="json")) for name in sections},
        charts=_charts(metrics) if metrics else "",
        mix=mix,
        last=metrics[-1] if metrics else None,
        best=min(validated, key=lambda m: m["validation/loss"] or 0.0) if validated else None,
        state=state,
        seconds=seconds,
        result=result,
    )
    run.write_bytes(page.encode(), "report.html")


def _settings(section: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """The settings of a section by dotted name, values as JSON."""
    settings: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            settings += _settings(value, f"{prefix}{key}.")
        else:
            settings.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return settings


def _charts(metrics: Sequence[MetricEntry]) -> Markup:
    drawn = [
        (title, curves, factor)
        for title, curves, factor in _CHARTS
        if any(m.get(name) is not None for m in metrics for name, _, _ in curves)
    ]
    figure, panels = axes(_COLUMNS, 11, rows=-(-len(drawn) // _COLUMNS), height=2.3)
    last = max(m["step"] or 0 for m in metrics)
    for panel, (title, curves, factor) in zip(panels, drawn, strict=False):
        for name, label, colour in curves:
            points = [(m["step"] or 0, m[name]) for m in metrics if name in m]
            scaled = [(step, None if value is None else factor * value) for step, value in points]
            if scaled:
                line(panel, scaled, colour, label or None)
        panel.set_title(title, fontsize=9, color=INK, loc="left")
        panel.set_xlim(0, last)
        if not _BELOW_ZERO.intersection(name for name, _, _ in curves):
            panel.set_ylim(bottom=0)
        if len(curves) > 1 and panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7, frameon=False, labelcolor=INK)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(drawn) - _COLUMNS) : len(drawn)]:
        panel.set_xlabel("step", fontsize=8, color=INK)
    figure.subplots_adjust(hspace=0.45, wspace=0.25)
    return svg(figure)
