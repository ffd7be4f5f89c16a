"""What an embedding says while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from crem.config import EmbedConfig
from pipelines.embedding import embed_progress
from pipelines.embedding.embed_progress import EmbedProgress, idle_by_thirds, slowest_stage
from pipelines.embedding.output import PROGRESS
from pipelines.embedding.window_embedder import WindowCounts
from pipelines.tables.storage import Folder


def window(actor: str = "a", *, device_s: float = 1.0, prepare_s: float = 0.0) -> WindowCounts:
    return WindowCounts(
        0, 0, True, 90, {"corrupt_image": 10}, tokens=1000, device_s=device_s, prepare_s=prepare_s, actor=actor
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the job sees."""
    now = [100.0]
    monkeypatch.setattr(embed_progress.time, "monotonic", lambda: now[0])
    return now


def progress(folder: Path, **settings: float) -> EmbedProgress:
    return EmbedProgress(Folder.at(str(folder)), 1000, 200, EmbedConfig(**settings), cpus=4.0)  # type: ignore[arg-type]


def test_rates_are_of_the_time_since_the_last_entry(tmp_path: Path, clock: list[float]) -> None:
    job = progress(tmp_path)
    assert job.entry().seconds_left is None and job.entry().slowest == "start"
    clock[0] += 10
    job.add(window(device_s=9))
    first = job.entry()
    assert (first.items, first.of, first.failed) == (300, 1000, 10)
    assert (first.items_per_s, first.tokens_per_s, first.busy) == (10, 100, 0.9)
    assert first.seconds_left == 70 and first.slowest == "model"  # 700 items at 10 a second
    clock[0] += 5
    second = job.entry()
    assert (second.items_per_s, second.busy, second.slowest) == (0, 0, "storage")
    assert second.seconds_left == 105


def test_models_of_several_actors_share_the_time(tmp_path: Path, clock: list[float]) -> None:
    job = progress(tmp_path)
    clock[0] += 10
    job.add(window("a", device_s=8))
    job.add(window("b", device_s=4))
    assert job.entry().busy == 0.6


def test_the_cost_is_that_of_all_actors(tmp_path: Path, clock: list[float]) -> None:
    job = progress(tmp_path, price_per_hour=3.0)
    clock[0] += 1800
    job.add(window("a"))
    job.add(window("b"))
    assert job.entry().cost == 3.0
    assert ", cost 3.00" in job.entry().line()
    assert progress(tmp_path).entry().cost is None


@pytest.mark.parametrize(
    ("model", "prepare", "expected"),
    [(0.95, 0.3, "model"), (0.4, 0.99, "prepare"), (0.2, 0.3, "storage"), (0.9, 0.9, "model")],
)
def test_the_busiest_stage_holds_the_others_back(model: float, prepare: float, expected: str) -> None:
    assert slowest_stage(started=True, model=model, prepare=prepare) == expected


def test_preparing_is_measured_against_the_cpus_that_models_leave(tmp_path: Path, clock: list[float]) -> None:
    job = progress(tmp_path)  # one actor of four CPUs: three tasks at once
    clock[0] += 10
    job.add(window(device_s=2, prepare_s=27))
    assert job.entry().slowest == "prepare"


def test_idle_shares_of_a_slow_start() -> None:
    samples = [(0.0, 0.0), (10.0, 0.0), (30.0, 20.0)]  # ten seconds of loading, then busy
    assert idle_by_thirds(samples, 30.0) == (1.0, 0.0, 0.0)
    assert idle_by_thirds([(0.0, 0.0), (15.0, 15.0)], 30.0) == (0.0, 0.5, 1.0)
    assert idle_by_thirds([(0.0, 0.0)], 0.0) == (0.0, 0.0, 0.0)


def test_entries_of_all_runs_stand_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_progress, "_LOG_EVERY_S", 0.01)
    monkeypatch.setattr(embed_progress, "_WRITE_EVERY_S", 0.02)
    for _ in range(2):
        with progress(tmp_path) as job:
            job.add(window())
            time.sleep(0.2)
    entries = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert len(entries) >= 4 and entries[-1]["items"] == 300
    assert {"time", "items_per_s", "tokens_per_s", "busy", "slowest", "seconds_left", "cost"} <= set(entries[0])


def test_the_last_entry_is_of_the_whole_run(tmp_path: Path, clock: list[float]) -> None:
    with progress(tmp_path) as job:
        clock[0] += 10
        job.add(window(device_s=9))
        job.entry()
        clock[0] += 10
    last = json.loads((tmp_path / PROGRESS).read_text().splitlines()[-1])
    assert (last["items_per_s"], last["busy"]) == (5, 0.45)


def test_a_long_run_keeps_a_bounded_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_progress, "_MOST_LINES", 10)
    for _ in range(100):
        with progress(tmp_path) as job:
            job.add(window())
    lines = (tmp_path / PROGRESS).read_text().splitlines()
    assert len(lines) <= 10 and json.loads(lines[-1])["items"] == 300
