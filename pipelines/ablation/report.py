"""The report of ``crem ablate``: ours beside the paper's, as one self-contained page and one image.

Bars of Table 3; curves over K of Table 4 with the nested model as a second line; the numbers; and the list of trends,
each with what came out. Ours and the paper's have axes of their own: a model of a million parameters on emoji and one
of two billion on MMEB share trends, if anything.
"""

from __future__ import annotations

import io
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("svg")
from matplotlib import pyplot as plt

from pipelines.ablation.variants import BACKBONE
from pipelines.tables.prepared import PreparedRows

__all__ = ["table", "write_ablation_report"]

_INK, _BLUE, _ORANGE, _GREEN, _GREY = "#1f2933", "#2b6cb0", "#c05621", "#2f855a", "#a0aec0"
_METRICS = {"retrieval": _BLUE, "native": _GREEN, "compressed": _ORANGE}
_TITLES = {
    "retrieval": ("Precision@1, mean of directions", "MMEB"),
    "native": ("native answers, exact match", "native generation, mean of six"),
    "compressed": ("compressed answers, exact match", "compressed generation, mean of six"),
}
_SHORT = {"retrieval_only": "retrieval\nonly", "generation_only": "generation\nonly", "both": "both", "crem": "CREM"}


def write_ablation_report(
    result: dict[str, Any], shown: dict[str, list[dict[str, Any]]], rows: PreparedRows
) -> tuple[str, bytes, bytes | None]:
    """The page, its main figure as PNG and that of the attention maps, where there are any.

    Args:
        result: the content of ``ablation.json``.
        shown: label -> images with their attention maps (``attention_maps.measure_maps``).
        rows: where the images are.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["points"] = _points
    environment.filters["verdict"] = verdict
    template = environment.from_string(
        (resources.files("pipelines.ablation") / "report.html.j2").read_text(encoding="utf-8")
    )
    figure, chart = _drawn(_figure(result))
    maps, maps_chart = _drawn(_maps(shown, rows)) if shown else (None, None)
    page = template.render(r=result, paper=result["paper"]["figures"], figure=figure, maps=maps)
    return page, chart, maps_chart


def _drawn(figure: Any) -> tuple[str, bytes]:
    """As SVG for the page and as PNG."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", bbox_inches="tight")
    figure.savefig(png, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    text = svg.getvalue()
    return text[text.index("<svg") :], png.getvalue()


def table(result: dict[str, Any]) -> str:
    """The figures and trends as lines of text."""
    lines = [f"{'%':<42}{'retrieval':>16}{'native':>16}{'compressed':>16}"]
    for row in result["rows"]:
        cells = "".join(f"{_points(row.get(metric)):>16}" for metric in _METRICS)
        lines.append(f"{row['label']:<42}{cells}")
        if paper := result["paper"]["figures"].get(row["key"]):
            numbers = "".join(f"{paper[m]:>16.1f}" if m in paper else f"{'–':>16}" for m in _METRICS)
            lines.append(f"{'  paper':<42}{numbers}")
    lines.append("")
    for trend in result["trends"] + result["map_trends"]:
        ours, paper = trend["ours"], trend["paper"]
        beside = "" if paper is None else f" (paper {paper:+.1f})"
        lines.append(f"{verdict(trend):<34}{ours['mean']:+6.2f}{_error(ours)}{beside}  {trend['text']}")
    return "\n".join(lines)


def verdict(trend: dict[str, Any]) -> str:
    """Whether a trend appears, and how sure that is."""
    appears = "appears" if trend["appears"] else "does not appear"
    if trend["clear"] is None:
        return f"{appears}, one seed"
    return f"{appears}, {'over' if trend['clear'] else 'within'} 2 SE"


def _points(value: dict[str, Any] | float | jinja2.Undefined | None) -> str:
    if value is None or isinstance(value, jinja2.Undefined):
        return "–"
    if isinstance(value, dict):
        return f"{value['mean']:.1f}{_error(value)}"
    return f"{value:.1f}"


def _error(value: dict[str, Any]) -> str:
    return "" if value["se"] is None else f" ± {value['se']:.1f}"


def _figure(result: dict[str, Any]) -> Any:
    """Table 3 in the first row, Table 4 below by metric; ours in the left column, the paper's in the right."""
    rows = {row["key"]: row for row in result["rows"]}
    paper = {
        key: {metric: {"mean": value, "se": None} for metric, value in figures.items()}
        for key, figures in result["paper"]["figures"].items()
    }
    main = result["config"]["ablate"]["chorus_tokens"]
    figure, axes = plt.subplots(4, 2, figsize=(10, 11.5), gridspec_kw={"height_ratios": [1.5, 1, 1, 1], "hspace": 0.5})
    n = len(result["seeds"])
    for axis, source, title, crem in (
        (axes[0][0], rows, f"Table 3, ours: mean of {n} seed{'s' * (n != 1)} ± standard error, %", main),
        (axes[0][1], paper, "Table 3, the paper (Qwen2-VL-2B), %", 16),
    ):
        _style(axis, title)
        _bars(axis, source, crem)
    counts = sorted(result["config"]["ablate"]["chorus_counts"])
    for place, metric in enumerate(_METRICS, 1):
        for axis, source, whose in ((axes[place][0], rows, 0), (axes[place][1], paper, 1)):
            _style(axis, f"Table 4, {('ours', 'the paper')[whose]}: {_TITLES[metric][whose]}, %")
            _curves(axis, source, metric, counts)
    return figure


def _style(axis: Any, title: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=_INK, labelsize=8)
    axis.grid(axis="y", color="#edf2f7")
    axis.set_axisbelow(True)
    axis.set_title(title, fontsize=9, color=_INK, loc="left")


def _bars(axis: Any, source: dict[str, Any], main: int) -> None:
    keys = ["retrieval_only@0", "generation_only@0", "both@0", f"crem@{main}"]
    for shift, (metric, colour) in zip((-0.27, 0, 0.27), _METRICS.items(), strict=True):
        held = [(i, source[k][metric]) for i, k in enumerate(keys) if metric in source.get(k, {})]
        if not held:
            continue
        bars = axis.bar(
            [i + shift for i, _ in held],
            [f["mean"] for _, f in held],
            0.25,
            yerr=[f["se"] or 0 for _, f in held],
            color=colour,
            ecolor=_INK,
            capsize=2,
            label=metric,
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=6, color=_INK, padding=2)
    if native := source.get(BACKBONE, {}).get("native"):
        axis.axhline(native["mean"], color=_GREEN, linestyle=":", linewidth=1)
        axis.text(3.5, native["mean"], "backbone,\nnative", fontsize=6.5, color=_GREEN, va="center")
    axis.set_xticks(range(len(keys)), [_SHORT[k.partition("@")[0]] for k in keys], fontsize=8)
    axis.set_xlim(-0.55, 3.95)
    axis.margins(y=0.12)
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.16))


def _curves(axis: Any, source: dict[str, Any], metric: str, counts: list[int]) -> None:
    places = {0: 0, **{k: i for i, k in enumerate(counts, 1)}}
    for family, keys, colour, label in (
        ("crem", ["retrieval_only@0", *(f"crem@{k}" for k in counts)], _METRICS[metric], "each K trained apart"),
        ("nested", [f"nested@{k}" for k in counts], _GREY, "one nested model"),
    ):
        held = [(places[int(k.partition("@")[2])], source[k][metric]) for k in keys if metric in source.get(k, {})]
        if held:
            axis.errorbar(
                [x for x, _ in held],
                [f["mean"] for _, f in held],
                yerr=[f["se"] or 0 for _, f in held],
                color=colour,
                linestyle="-" if family == "crem" else "--",
                marker="o",
                markersize=4,
                linewidth=1.5,
                capsize=3,
                label=label,
            )
    axis.set_xticks(list(places.values()), ["EOS" if not k else str(k) for k in places], fontsize=8)
    axis.set_xlim(-0.3, len(places) - 0.7)
    axis.set_xlabel("K, chorus tokens", fontsize=7, labelpad=1)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, framealpha=0.7, edgecolor="none", loc="best")


def _maps(shown: dict[str, list[dict[str, Any]]], rows: PreparedRows) -> Any:
    """A row for each image: the image, and for each model its mean map over it and that of every chorus token."""
    images = [entry["image"] for entry in next(iter(shown.values()))]
    columns = 1 + 2 * len(shown)
    figure, axes = plt.subplots(
        len(images),
        columns,
        figsize=(1.75 * columns, 1.95 * len(images)),
        squeeze=False,
        gridspec_kw={"hspace": 0.3},
    )
    for line, image_id in zip(axes, images, strict=True):
        image = np.asarray(Image.open(io.BytesIO(rows.image(image_id))).convert("RGB"))
        line[0].imshow(image)
        for number, entries in enumerate(shown.values()):
            entry = next(e for e in entries if e["image"] == image_id)
            maps = np.array(entry["maps"])
            mean, tokens = line[1 + 2 * number], line[2 + 2 * number]
            mean.imshow(image, extent=(0, 1, 0, 1), alpha=0.45)
            mean.imshow(maps.mean(0), extent=(0, 1, 0, 1), cmap="magma", alpha=0.6, vmin=0, vmax=4 / maps[0].size)
            tokens.imshow(_tiled(maps), cmap="magma", vmin=0, vmax=4 / maps[0].size)
            overlap = "–" if entry["overlap"] is None else f"{entry['overlap']:.2f}"
            mean.set_xlabel(f"coverage {entry['coverage']:.2f}", fontsize=7, labelpad=2)
            tokens.set_xlabel(f"overlap {overlap}", fontsize=7, labelpad=2)
    for number, label in enumerate(shown):
        axes[0][1 + 2 * number].set_title(f"{label}\nmean", fontsize=8, color=_INK, loc="left")
        axes[0][2 + 2 * number].set_title("each chorus token", fontsize=8, color=_INK, loc="left")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return figure


def _tiled(maps: np.ndarray) -> np.ndarray:
    """The K maps [K, h, w] as one image, white between them."""
    count, height, width = maps.shape
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    out = np.full((down * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    for k in range(count):
        top, left = (k // across) * (height + 1), (k % across) * (width + 1)
        out[top : top + height, left : left + width] = maps[k]
    return out
