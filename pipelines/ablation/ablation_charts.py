"""Charts of the ablation: bars of Table 3, curves over K of Table 4 with the nested model beside, and attention maps.

Ours and the paper's have axes of their own: a model of a million parameters on emoji and one of two billion on MMEB
share trends, if anything.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pipelines.ablation.ablation_result import AblationResult
from pipelines.ablation.attention_maps import ImageExample
from pipelines.ablation.trends import Estimate
from pipelines.ablation.variants import BACKBONE
from pipelines.reports.charts import BLUE, GREEN, GREY, INK, ORANGE, axes
from pipelines.tables.prepared import PreparedRows

__all__ = ["maps_figure", "tables_figure"]

_Figures = Mapping[str, Mapping[str, Estimate]]
"""key -> metric -> percent"""

_METRICS = {"retrieval": BLUE, "native": GREEN, "compressed": ORANGE}
_TITLES = {
    "retrieval": ("Precision@1, mean of directions", "MMEB"),
    "native": ("native answers, exact match", "native generation, mean of six"),
    "compressed": ("compressed answers, exact match", "compressed generation, mean of six"),
}
_SHORT = {"retrieval_only": "retrieval\nonly", "generation_only": "generation\nonly", "both": "both", "crem": "CREM"}
_PAPER_MAIN = 16
"""K of the paper's main results."""


def tables_figure(result: AblationResult) -> Figure:
    """Table 3 in the first row, Table 4 below by metric; ours in the left column, the paper's in the right."""
    ours: _Figures = {row.key: row.metrics for row in result.rows}
    paper: _Figures = {
        key: {metric: Estimate(value, None, 1) for metric, value in figures.items()}
        for key, figures in result.paper.figures.items()
    }
    ratios = {"height_ratios": [1.5, 1, 1, 1], "hspace": 0.5}
    figure, panels = axes(2, 10, rows=4, height=11.5 / 4, gridspec_kw=ratios)
    n, main = len(result.seeds), result.setting("ablate", "chorus_tokens")
    for axis, figures, title, k in (
        (panels[0], ours, f"Table 3, ours: mean of {n} seed{'s' * (n != 1)} ± standard error, %", main),
        (panels[1], paper, "Table 3, the paper (Qwen2-VL-2B), %", _PAPER_MAIN),
    ):
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        _bars(axis, figures, k)
    counts = sorted(result.setting("ablate", "chorus_counts"))
    for number, metric in enumerate(_METRICS, 1):
        left, right = panels[2 * number : 2 * number + 2]
        our_title, paper_title = _TITLES[metric]
        for axis, figures, title in ((left, ours, f"ours: {our_title}"), (right, paper, f"the paper: {paper_title}")):
            axis.set_title(f"Table 4, {title}, %", fontsize=9, color=INK, loc="left")
            _curves(axis, figures, metric, counts)
    return figure


def _bars(axis: Any, figures: _Figures, main: int) -> None:
    keys = ["retrieval_only@0", "generation_only@0", "both@0", f"crem@{main}"]
    for shift, (metric, colour) in zip((-0.27, 0, 0.27), _METRICS.items(), strict=True):
        bars = [(i, figures[key][metric]) for i, key in enumerate(keys) if metric in figures.get(key, {})]
        if not bars:
            continue
        drawn = axis.bar(
            [i + shift for i, _ in bars],
            [f.mean for _, f in bars],
            0.25,
            yerr=[f.se or 0 for _, f in bars],
            color=colour,
            ecolor=INK,
            capsize=2,
            label=metric,
        )
        axis.bar_label(drawn, fmt="%.1f", fontsize=6, color=INK, padding=2)
    if native := figures.get(BACKBONE, {}).get("native"):
        axis.axhline(native.mean, color=GREEN, linestyle=":", linewidth=1)
        axis.text(3.5, native.mean, "backbone,\nnative", fontsize=6.5, color=GREEN, va="center")
    axis.set_xticks(range(len(keys)), [_SHORT[key.partition("@")[0]] for key in keys], fontsize=8)
    axis.set_xlim(-0.55, 3.95)
    axis.margins(y=0.12)
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.16))


def _curves(axis: Any, figures: _Figures, metric: str, counts: Sequence[int]) -> None:
    places = {0: 0, **{k: i for i, k in enumerate(counts, 1)}}
    for family, keys, colour, label in (
        ("crem", ["retrieval_only@0", *(f"crem@{k}" for k in counts)], _METRICS[metric], "each K trained apart"),
        ("nested", [f"nested@{k}" for k in counts], GREY, "one nested model"),
    ):
        points = [
            (places[int(key.partition("@")[2])], figures[key][metric]) for key in keys if metric in figures.get(key, {})
        ]
        if points:
            axis.errorbar(
                [x for x, _ in points],
                [f.mean for _, f in points],
                yerr=[f.se or 0 for _, f in points],
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


def maps_figure(examples: Mapping[str, Sequence[ImageExample]], rows: PreparedRows) -> Figure:
    """A row for each image: the image, and for each model its mean map over it and that of every chorus token."""
    images = [example.image for example in next(iter(examples.values()))]
    columns = 1 + 2 * len(examples)
    figure, panels = axes(columns, 1.75 * columns, rows=len(images), height=1.95, gridspec_kw={"hspace": 0.3})
    for number, image_id in enumerate(images):
        image_axis, *map_axes = panels[number * columns : (number + 1) * columns]
        image = np.asarray(Image.open(io.BytesIO(rows.image(image_id))).convert("RGB"))
        image_axis.imshow(image)
        for model, of_model in enumerate(examples.values()):
            example = next(e for e in of_model if e.image == image_id)
            maps = np.array(example.maps)
            top = 4 / maps[0].size
            mean_axis, tokens_axis = map_axes[2 * model : 2 * model + 2]
            mean_axis.imshow(image, extent=(0, 1, 0, 1), alpha=0.45)
            mean_axis.imshow(maps.mean(0), extent=(0, 1, 0, 1), cmap="magma", alpha=0.6, vmin=0, vmax=top)
            tokens_axis.imshow(_tiled(maps), cmap="magma", vmin=0, vmax=top)
            overlap = "–" if example.overlap is None else f"{example.overlap:.2f}"
            mean_axis.set_xlabel(f"coverage {example.coverage:.2f}", fontsize=7, labelpad=2)
            tokens_axis.set_xlabel(f"overlap {overlap}", fontsize=7, labelpad=2)
    for model, label in enumerate(examples):
        panels[1 + 2 * model].set_title(f"{label}\nmean", fontsize=8, color=INK, loc="left")
        panels[2 + 2 * model].set_title("each chorus token", fontsize=8, color=INK, loc="left")
    for axis in panels:
        axis.grid(visible=False)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return figure


def _tiled(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The K maps [K, h, w] as one image, white between them."""
    count, height, width = maps.shape
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    tiled = np.full((down * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    for k in range(count):
        top, left = (k // across) * (height + 1), (k % across) * (width + 1)
        tiled[top : top + height, left : left + width] = maps[k]
    return tiled
