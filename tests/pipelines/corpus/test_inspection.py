"""``crem inspect``: what it says is what ``prepare`` would do, and it hides nothing."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crem.config import load_config
from crem.errors import ConfigError
from pipelines.corpus.inspection import inspect_source
from pipelines.corpus.inspection_page import inspection_page, inspection_text
from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import encoded, random_image, write_rows

CONFIG = load_config("micro", [])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six rows: four good, one with a picture that is not there, one without a target; a column nobody knows."""
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        (folder / "images" / f"{number}.png").write_bytes(encoded(random_image(number)))
    rows = [
        {"key": f"k{n}", "query_images": [f"{n}.png"], "target_text": f"<b>box</b> {n}", "aisle": n} for n in range(4)
    ]
    rows += [{"key": "gone", "query_images": ["9.png"], "target_text": "t"}, {"key": "alone", "query_text": "q"}]
    write_rows(folder / "rows" / "a.jsonl", rows)
    (folder / "rows" / "notes.bin").write_bytes(b"?")
    return folder


def test_the_sample_is_counted_and_every_rejection_has_its_reason(corpus: Path) -> None:
    found = inspect_source(str(corpus), CONFIG)
    assert (found.count.rows, found.count.exact) == (6, True)
    assert (found.records_checked, found.rows_checked) == (6, 6)
    assert found.rejected == {"image_missing": 1, "empty_target": 1}
    assert found.first_rejected["image_missing"][0] == "gone"
    assert found.sizes == [random_image(n).size for n in range(4)]
    uses = {column.name: column.use for column in found.columns}
    assert uses == {
        "key": "used", "query_images": "used", "target_text": "used", "aisle": "unknown", "query_text": "used"
    }  # fmt: skip
    text = inspection_text(found)
    assert "6 in 1 files" in text and "4 kept, 2 rejected" in text
    assert "'aisle' is not known" in text


def test_the_page_shows_the_pictures_and_escapes_texts(corpus: Path) -> None:
    page = inspection_page(inspect_source(str(corpus), CONFIG))
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)]
    assert len(pictures) == 4 and pictures[0].startswith(b"\x89PNG")
    assert "&lt;b&gt;box&lt;/b&gt; 3" in page and "<b>box</b>" not in page
    assert "http" not in page.replace("http-equiv", ""), "the page loads nothing"


def test_a_misspelt_column_is_shown_with_what_prepare_says_of_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "c" / "a.jsonl", [{"query_text": "q", "target_text": "t", "splt": "test"}])
    found = inspect_source(str(tmp_path / "c"), CONFIG)
    assert [(c.use, c.nearest) for c in found.columns if c.name == "splt"] == [("unknown", "split")]
    assert any("prepare refuses" in note and "'split'" in note for note in found.warnings)
    write_rows(tmp_path / "d" / "a.jsonl", [{"foo": 1}])
    with pytest.raises(ConfigError, match="none of them is known"):
        inspect_source(str(tmp_path / "d"), CONFIG)


def test_prepared_tables_are_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "done" / "rejected").mkdir(parents=True)
    write_rows(tmp_path / "done" / "rows" / "a.parquet", [{"query_text": "q", "target_text": "t"}])
    inspect_source(str(tmp_path / "done"), CONFIG)
    counts = {"rows_in": 1, "rows_out": 1, "rejected": 0, "images": 0}
    PrepareManifest(**counts, by_reason={}, by_split_task={}, source_uri="x", created_with={}, config={}).write(
        Folder.at(tmp_path / "done")
    )
    with pytest.raises(ConfigError, match="tables that crem prepare made already"):
        inspect_source(str(tmp_path / "done"), CONFIG)


def test_the_command_writes_nothing_beside_the_corpus(corpus: Path, tmp_path: Path) -> None:
    before = sorted(p.relative_to(corpus) for p in corpus.rglob("*"))
    html = tmp_path / "page.html"
    run = subprocess.run(
        [sys.executable, "-m", "crem.cli", "inspect", str(corpus), "--html", str(html)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "image_missing" in run.stdout and f"page: {html}" in run.stdout
    assert html.stat().st_size > 2000
    assert sorted(p.relative_to(corpus) for p in corpus.rglob("*")) == before
    assert json.dumps("k0")[1:-1] in run.stdout
