"""Whatever bytes come: an image or an ``ItemError``, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("count", "seed"), [(300, 1), pytest.param(5000, 2, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_mutated_images(count: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.crem.data.image_fuzz", str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30 + count)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    result = json.loads(done.stdout.splitlines()[-1])
    outcomes = result["outcomes"]
    assert sum(outcomes.values()) == count
    assert set(outcomes) <= {"image", "truncated", "image_corrupt", "image_too_large"}
    assert min(outcomes["image"], outcomes["image_corrupt"]) > count / 10, "mutations of both kinds"
    assert result["slowest_s"] < 5 and result["grown_kib"] < 400_000, result
