"""The whole path through the command that the README names, shortened, in an empty folder and again in the same one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crem

pytestmark = pytest.mark.ray

SHORT = ["train.steps=6", "optim.warmup_steps=2", "evaluate.max_answers=16", "train.log_every=2"]


def demo(out: Path) -> str:
    command = [sys.executable, "-m", "crem.cli", "demo", "--out", str(out), *SHORT]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short demo, which did not exist before."""
    folder = tmp_path_factory.mktemp("fresh") / "demo"
    printed = demo(folder)
    assert "report.html" in printed and "text_to_image" in printed
    return folder


def test_demo_leaves_a_report_of_the_shipped_model(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    # the shipped model is evaluated and served; the one trained just now is reported beside it
    assert crem.load(out / "model").fingerprint == crem.load("crem-micro").fingerprint
    assert report["evaluation"]["fingerprint"] == crem.load("crem-micro").fingerprint
    assert report["short"]["fingerprint"] == crem.load(out / "run" / "model").fingerprint
    assert len({report[k]["fingerprint"] for k in ("evaluation", "short", "untrained")}) == 3
    assert report["train"]["steps"] == 6 and [c["step"] for c in report["curves"]] == [2, 4, 6]
    assert report["prepare"]["rows_in"] == report["prepare"]["rows_out"] + report["prepare"]["rejected"]
    assert report["embed"]["embedded"] == report["index"]["count"] == report["prepare"]["images"]
    assert set(report["timings_s"]) >= {"prepare", "train", "embed", "index", "evaluate", "serve", "total"}
    assert all(check["kept"] for check in report["checks"].values()), report["checks"]
    for direction in ("text_to_image", "image_to_text", "image_to_image"):
        figures = report["evaluation"]["retrieval"][direction]["all"]
        assert figures["queries"] == figures["candidates"] == 1594 or direction == "image_to_text"
        assert figures["chance_at_1"] == pytest.approx(1 / figures["candidates"])
    assert len(report["serve"]["chats"]) == 4 and len(report["serve"]["searches"]) == 5
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and page.count("data:image/png;base64,") > 100
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", page)


@pytest.mark.slow
def test_demo_runs_again_in_the_same_folder(out: Path) -> None:
    """And the same seed gives the same model."""
    before = json.loads((out / "report.json").read_text())
    assert "Traceback" not in demo(out)
    after = json.loads((out / "report.json").read_text())
    for name in ("evaluation", "short", "untrained"):
        assert after[name]["fingerprint"] == before[name]["fingerprint"]


def test_demo_refuses_a_folder_of_yours(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    command = [sys.executable, "-m", "crem.cli", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "thesis.txt" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
