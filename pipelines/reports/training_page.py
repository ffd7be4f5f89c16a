"""``report.html`` of a training run: its curves, configuration and data, as one self-contained page.

It is drawn again while the run goes on, and at its end, also when that is a failure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

from crem.config import RunConfig
from pipelines.reports.charts import BLUE, GREEN, INK, ORANGE, axes, line, svg
from pipelines.tables.storage import Folder

__all__ = ["write_training_report"]

_COLUMNS = 3
_Curve = tuple[str, str, str]

_CHARTS: tuple[tuple[str, tuple[_Curve, ...], float], ...] = (
    # title, curves (name, label, colour), factor of the values
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
"""The one curve that lies below zero."""


def write_training_report(
    run: Folder,
    config: RunConfig,
    metrics: Sequence[dict[str, Any]],
    *,
    mix: list[dict[str, Any]],
    state: str,
    seconds: float,
    result: dict[str, Any] | None,
) -> None:
    """Write the page.

    Args:
        metrics: entries of metrics.jsonl.
        state: ``running``, ``complete`` or ``failed: …``.
        seconds: since this start of the run.
        result: what the finished run returned; None before.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    template = environment.from_string(
        (resources.files("pipelines.reports") / "training.html.j2").read_text(encoding="utf-8")
    )
    sections = {
        name: getattr(config, name).model_dump(mode="json") for name in ("model", "data", "loss", "optim", "train")
    }
    validated = [m for m in metrics if m.get("validation/loss") is not None]
    page = template.render(
        name=run.name,
        uri=run.uri,
        config=config,
        sections={name: _flat(section) for name, section in sections.items()},
        charts=_charts(metrics) if metrics else "",
        mix=mix,
        total={key: sum(entry[key] for entry in mix) for key in ("rows", "pairs", "answers", "held_out")},
        last=metrics[-1] if metrics else None,
        best=min(validated, key=lambda m: m["validation/loss"]) if validated else None,
        state=state,
        seconds=seconds,
        result=result,
    )
    run.write_bytes(page.encode(), "report.html")


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _flat(section: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return out


def _charts(metrics: Sequence[dict[str, Any]]) -> str:
    shown = [
        (title, curves, factor)
        for title, curves, factor in _CHARTS
        if any(m.get(name) is not None for m in metrics for name, _, _ in curves)
    ]
    figure, panels = axes(_COLUMNS, 11, rows=-(-len(shown) // _COLUMNS), height=2.3)
    last = max(m["step"] for m in metrics)
    for panel, (title, curves, factor) in zip(panels, shown, strict=False):
        for name, label, colour in curves:
            points = [(m["step"], m[name]) for m in metrics if name in m]
            scaled = [(step, None if value is None else factor * value) for step, value in points]
            if scaled:
                line(panel, scaled, colour, label or None)
        panel.set_title(title, fontsize=9, color=INK, loc="left")
        panel.set_xlim(0, last)
        if not _BELOW_ZERO.intersection(name for name, _, _ in curves):
            panel.set_ylim(bottom=0)
        if len(curves) > 1 and panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7, frameon=False, labelcolor=INK)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(shown) - _COLUMNS) : len(shown)]:
        panel.set_xlabel("step", fontsize=8, color=INK)
    figure.subplots_adjust(hspace=0.45, wspace=0.25)
    return svg(figure)
