"""The palette of the report pages, and their charts as SVG. ``pyplot`` is not used: its state is global, and the
training report is drawn in a thread."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "INK", "LIGHT_GREY", "ORANGE", "PALETTE", "axes", "line", "png", "style", "svg"]

PALETTE = {
    "ink": "#1f2933",
    "muted": "#52606d",
    "blue": "#2b6cb0",
    "orange": "#c05621",
    "green": "#2f855a",
    "red": "#c53030",
    "grey": "#a0aec0",
    "light_grey": "#cbd5e0",
    "rule": "#e2e8f0",
    "faint_rule": "#edf2f7",
    "panel": "#f7fafc",
}
INK, BLUE, ORANGE, GREEN = (PALETTE[name] for name in ("ink", "blue", "orange", "green"))
GREY, LIGHT_GREY = PALETTE["grey"], PALETTE["light_grey"]


def axes(columns: int, width: float, *, rows: int = 1, height: float = 2.8, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of ``rows`` x ``columns`` plain axes, in reading order; sizes in inches, ``options`` as ``subplots``."""
    figure = Figure(figsize=(width, height * rows))
    grid = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in grid:
        style(axis)
    return figure, grid


def style(axis: Any) -> None:
    """Two spines, small ticks and faint horizontal lines."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8)
    axis.grid(axis="y", color=PALETTE["faint_rule"])
    axis.set_axisbelow(True)


def line(axis: Any, points: Sequence[tuple[float, float | None]], colour: str = BLUE, label: str | None = None) -> None:
    """A curve over steps; None leaves a gap, and a curve of few points marks them."""
    values = [float("nan") if y is None else y for _, y in points]
    marker = "o" if len(points) <= 20 else None
    axis.plot([x for x, _ in points], values, color=colour, linewidth=1.6, label=label, marker=marker, markersize=3)


def svg(figure: Figure) -> Markup:
    """The figure as an ``<svg>`` element: the same figure is the same text, without a date and with no random names."""
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "crem"}):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, bbox_inches="tight")
    return out.getvalue()
