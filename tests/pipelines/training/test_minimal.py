"""The loop on one page, as its command: on tables that ``crem prepare`` wrote, without Ray and DeepSpeed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from crem.config import load_config
from pipelines.corpus.prepare import prepare
from tests.conftest import TINY
from tests.pipelines.shapes import write_corpus

SETTINGS = [*TINY, "train.global_batch=32", "optim.lr=3e-3", "loss.alpha_g=1"]
COMMAND = """
import runpy, sys
runpy.run_module("crem.train.minimal", run_name="__main__")
print("imported:", sorted({"ray", "deepspeed"} & set(sys.modules)))
"""


@pytest.mark.ray
def test_both_losses_fall(tmp_path: Path, local_ray: None) -> None:
    prepare(write_corpus(tmp_path / "corpus"), str(tmp_path / "prepared"), load_config("micro", SETTINGS))
    for name in ("rows", "images"):  # of another version: a reader of the whole folder would fail
        (tmp_path / "prepared" / name / "part-of-another-version.parquet").write_bytes(b"not read")
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "prepared"), "--steps", "30", *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"step +(\d+) +retrieval ([\d.]+) +generation ([\d.]+)", done.stdout)
    assert [int(step) for step, _, _ in lines] == list(range(1, 31))
    for term in (1, 2):
        first, last = (sum(float(line[term]) for line in part) for part in (lines[:5], lines[-5:]))
        assert last < 0.8 * first, done.stdout
    assert "imported: []" in done.stdout
