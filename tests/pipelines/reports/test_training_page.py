"""The page of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from crem.config import load_config
from pipelines.reports.training_page import write_training_report
from pipelines.tables.storage import Folder

METRICS = {
    "loss": 2.0,
    "retrieval": 1.5,
    "generation": 0.5,
    "answer_tokens": 40,
    "alignment": 0.3,
    "uniformity": -2.0,
    "temperature": 0.05,
    "lr": 2e-3,
    "grad_norm": 1.25,
    "samples_per_s": 812.4,
    "tokens_per_s": 21_480.0,
    "flops_utilisation": 0.184,
    "peak_flops": 1.2e11,
    "waiting_share": 0.02,
    "padding_share": 0.05,
    "seconds_left": 4000.0,
}


@dataclass(frozen=True)
class Mix:
    source: str
    task: str
    rows: int
    pairs: int = 10
    answers: int = 3
    held_out: int = 7


@dataclass(frozen=True)
class Model:
    parameters: int
    fingerprint: str


def entry(step: int, **terms: float | None) -> dict[str, float | None]:
    return {"step": step, **METRICS, **terms}


def write_page(folder: Path, metrics: list[dict[str, float | None]], state: str, result: Model | None = None) -> str:
    mix = [Mix("emoji", f"task {i}", 4000 - i) for i in range(3)]
    config = load_config("micro", ["model.prompt.system=<b>&"])
    write_training_report(Folder.at(folder), config, metrics, mix=mix, state=state, seconds=90.0, result=result)
    return (folder / "report.html").read_text()


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    steps = np.arange(10, 210, 10)
    metrics = [entry(int(s), loss=5 * float(np.exp(-s / 90)), retrieval=float(4 / s)) for s in steps]
    metrics[9] |= {"validation/loss": 3.25, "validation/precision_at_1": 0.5, "validation/retrieval": 2.0}
    metrics[19] |= {"validation/loss": 3.5, "validation/precision_at_1": 0.6, "validation/retrieval": 2.5}
    metrics[3]["alignment"] = None
    page = write_page(tmp_path, metrics, "running")
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page and "<b>&</td>" not in page and "&lt;b&gt;&amp;" in page
    assert page.count("<svg") == 1 and "3.25" in page and "step 100" in page and "11,997" in page


def test_the_page_of_a_run_that_failed_at_once(tmp_path: Path) -> None:
    page = write_page(tmp_path, [], "failed: the loss of step 3 is nan")
    assert "failed: the loss of step 3 is nan" in page and "<svg" not in page


def test_the_page_of_a_finished_run_names_its_model_and_a_title_names_the_run_once(tmp_path: Path) -> None:
    page = write_page(tmp_path / "run", [entry(10, alignment=None)], "complete", Model(1_500_000, "0123abcd"))
    assert "1.5 M parameters" in page and "fingerprint 0123abcd" in page and "min left" not in page
    assert "<title>CREM training: run</title>" in page and "<h1>CREM training: run</h1>" in page


@pytest.mark.parametrize("rows", [60, 62])
def test_the_page_has_the_sixty_largest_sources_and_the_sum_of_all(tmp_path: Path, rows: int) -> None:
    mix = [Mix("emoji", f"task {i}", 4000 - i) for i in range(rows)]
    write_training_report(
        Folder.at(tmp_path), load_config("micro"), [], mix=mix, state="running", seconds=1.0, result=None
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count('<td class="l">emoji</td>') == 60 and f"{sum(m.rows for m in mix):,}" in page
    assert ("(2 smaller ones are left out)" in page) == (rows == 62)
