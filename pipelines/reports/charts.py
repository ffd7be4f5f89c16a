"""Charts of the report pages, as SVG text. Not by ``pyplot``, whose state is global: a thread draws too."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ORANGE", "axes", "line", "svg"]

INK, BLUE, ORANGE, GREY, GREEN = "#1f2933", "#2b6cb0", "#c05621", "#a0aec0", "#2f855a"


def axes(columns: int, width: float, *, rows: int = 1, height: float = 2.8) -> tuple[Figure, list[Any]]:
    """A figure of ``rows`` x ``columns`` plain axes, in reading order."""
    figure = Figure(figsize=(width, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8)
        axis.grid(axis="y", color="#edf2f7")
        axis.set_axisbelow(True)
    return figure, list(grid.flat)


def line(axis: Any, points: Sequence[tuple[float, float | None]], colour: str = BLUE, label: str | None = None) -> None:
    """A curve over steps; what is not a number leaves a gap, and a curve of few points shows them."""
    values = [float("nan") if y is None else y for _, y in points]
    marker = "o" if len(points) <= 20 else None
    axis.plot([x for x, _ in points], values, color=colour, linewidth=1.6, label=label, marker=marker, markersize=3)


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    text = out.getvalue()
    return text[text.index("<svg") :]
