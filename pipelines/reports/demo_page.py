"""``report.html``: the result of a run as one self-contained page, made to be looked at."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from pipelines.reports.charts import BLUE, GREY, INK, ORANGE, axes, line, svg
from pipelines.tables.prepared import PreparedRows

__all__ = ["write_report"]


def write_report(report: dict[str, Any], rows: PreparedRows, path: Path) -> None:
    """Write the page for ``report`` (the content of report.json); images come from ``rows``."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["image"] = lambda image_id: _data_url(rows.image(image_id))
    environment.filters["percent"] = lambda value, digits=1: f"{value * 100:.{digits}f} %"
    environment.filters["kib"] = lambda value: f"{value / 1024:.1f} KiB"
    template = environment.from_string(
        (resources.files("pipelines.reports") / "demo.html.j2").read_text(encoding="utf-8")
    )
    charts = {
        "curves": _curves(report["curves"]),
        "retrieval": _precision(report["evaluation"], report["short"], report["untrained"]),
        "answers": _answers(report["evaluation"], report["untrained"]),
    }
    path.write_text(template.render(r=report, charts=charts), encoding="utf-8")


def _data_url(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _curves(metrics: list[dict[str, Any]]) -> str:
    figure, places = axes(3, 10)
    for axis, name, title in zip(
        places,
        ("retrieval", "generation", "samples_per_s"),
        ("retrieval loss (InfoNCE)", "generation loss (per answer token)", "samples / s"),
        strict=True,
    ):
        line(axis, [(m["step"], m[name]) for m in metrics])
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylim(bottom=0)
    return svg(figure)


def _precision(shipped: dict[str, Any], short: dict[str, Any], untrained: dict[str, Any]) -> str:
    tasks = list(shipped["retrieval"])
    figure, panels = axes(max(1, len(tasks)), 10)
    for axis, task in zip(panels, tasks, strict=False):
        splits = list(shipped["retrieval"][task])
        places = range(len(splits))
        for shift, source, colour, label in (
            (-0.28, shipped, BLUE, "crem-micro"),
            (0, short, ORANGE, "this run"),
            (0.28, untrained, GREY, "untrained"),
        ):
            values = [100 * source["retrieval"][task][s]["precision_at_1"] for s in splits]
            bars = axis.bar([p + shift for p in places], values, 0.26, color=colour, label=label)
            axis.bar_label(bars, fmt="%.1f", fontsize=7, color=INK)
        axis.set_xticks(list(places), [s.replace("_", "\n") for s in splits], fontsize=7)
        axis.set_title(f"{task.replace('_', ' ')}: Precision@1, %", fontsize=9, color=INK, loc="left")
    panels[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg(figure)


def _answers(trained: dict[str, Any], untrained: dict[str, Any]) -> str:
    figure, (axis,) = axes(1, 5)
    splits = list(trained["answers"])
    places = range(len(splits))
    bars = (
        (-0.3, "native", trained, BLUE, "native"),
        (-0.1, "compressed", trained, ORANGE, "compressed"),
        (0.1, "commonest", trained, "#cbd5e0", "commonest answer"),
        (0.3, "native", untrained, GREY, "untrained, native"),
    )
    for shift, name, source, colour, label in bars:
        values = [100 * source["answers"][s][name] for s in splits]
        axis.bar_label(
            axis.bar([p + shift for p in places], values, 0.19, color=colour, label=label), fmt="%.0f", fontsize=7
        )
    axis.set_xticks(list(places), splits, fontsize=8)
    axis.set_title("answers: exact match, %", fontsize=9, color=INK, loc="left")
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg(figure)
