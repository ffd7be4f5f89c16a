"""The report of ``crem ablate``: ours beside the paper's, as one self-contained page and two images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.ablation.ablation_charts import maps_figure, tables_figure
from pipelines.ablation.ablation_result import AblationResult
from pipelines.ablation.ablation_text import points, verdict
from pipelines.ablation.attention_maps import ImageExample
from pipelines.reports.charts import png, svg
from pipelines.reports.pages import render
from pipelines.tables.prepared import PreparedRows

__all__ = ["AblationPage", "ablation_page"]


@dataclass(frozen=True)
class AblationPage:
    """The page, and its charts as PNG."""

    html: str
    chart: bytes
    maps_chart: bytes | None
    """None where no run has attention maps"""


def ablation_page(
    result: AblationResult, examples: Mapping[str, Sequence[ImageExample]], rows: PreparedRows
) -> AblationPage:
    """Draw the page.

    Args:
        examples: label -> images with their attention maps.
        rows: where the images are.
    """
    tables, maps = tables_figure(result), maps_figure(examples, rows) if examples else None
    html = render(
        "ablation.html.j2",
        r=result,
        points=points,
        verdict=verdict,
        figure=svg(tables),
        maps=svg(maps) if maps else None,
    )
    return AblationPage(html, png(tables), png(maps) if maps else None)
