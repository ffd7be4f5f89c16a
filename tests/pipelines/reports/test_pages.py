"""The templates that all report pages share."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jinja2
import pytest

from crem.config import load_config
from pipelines.reports.charts import PALETTE, axes, line, png, svg
from pipelines.reports.pages import data_url, render
from pipelines.reports.training_page import write_training_report
from pipelines.tables.storage import Folder

TEMPLATES = sorted(f.name for f in (resources.files("pipelines.reports") / "templates").iterdir())


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_page_takes_style_and_colours_from_the_base(name: str) -> None:
    source = (resources.files("pipelines.reports") / "templates" / name).read_text(encoding="utf-8")
    assert name == "base.html.j2" or source.startswith('{% extends "base.html.j2" %}')
    assert not [colour for colour in PALETTE.values() if colour in source], "colours are named in charts.PALETTE"
    assert "|safe" not in source


def test_a_name_that_a_template_does_not_get_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("training.html.j2", name="x")


def test_texts_are_escaped_and_tables_scroll_on_a_phone(tmp_path: Path) -> None:
    run = Folder.at(tmp_path / "run")
    write_training_report(
        run, load_config("micro"), [], mix=[], state="failed: <script>alert(1)</script>", seconds=1.0, result=None
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "overflow-x: auto" in page and 'name="viewport"' in page


def test_charts_are_markup_and_png() -> None:
    figure, (axis,) = axes(1, 3)
    line(axis, [(0, 1.0), (10, None), (20, 3.0)], label="<loss>")
    axis.legend()
    assert svg(figure).startswith("<svg") and "&lt;loss&gt;" in svg(figure)
    assert png(figure).startswith(b"\x89PNG")


def test_images_are_in_the_page() -> None:
    assert data_url(b"\x89PNG\r\n") == "data:image/png;base64,iVBORw0K"
    assert data_url(b"\xff\xd8").startswith("data:image/jpeg;base64,")


def test_the_same_chart_is_the_same_text() -> None:
    def drawn() -> str:
        figure, (panel,) = axes(1, 3)
        line(panel, [(0, 1.0), (1, 2.0)])
        return str(svg(figure))

    assert drawn() == drawn()
