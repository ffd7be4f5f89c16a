"""What the README of the benchmarks says of duplicates holds on a small sample."""

from __future__ import annotations

import pytest

from tests.bench import bench_duplicates


def test_bench_duplicates(capsys: pytest.CaptureFixture[str]) -> None:
    bench_duplicates.main(["--count", "20", "--rows", "--signatures", "2000"])
    printed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {row[0]: row[1:] for row in printed}
    recall = {copy: float(found[copy][0]) for copy in ("q50", "half", "crop", "bright")}
    assert min(recall.values()) >= 0.8 and recall["half"] >= 0.95
    assert [found[change][1] for change in ("upper case", "punctuation", "another word")] == ["1.000", "1.000", "0.000"]
    assert int(found["2,000"][0]) == 7, "tables for so few signatures"
