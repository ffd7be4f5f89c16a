"""The benchmarks run, at the smallest sizes, and print whole tables; their figures are not judged here."""

from __future__ import annotations

import pytest

from tests.bench import bench_decode, bench_step


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
