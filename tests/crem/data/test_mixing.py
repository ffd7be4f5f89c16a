"""The order of rows: a pure function of seed and step, whole epochs, equal slices for every number of ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from crem.config import DataConfig
from crem.data.mixing import MixingPlan
from crem.errors import ConfigError

RETRIEVAL, HETEROGENEOUS = np.arange(50), np.arange(50, 70)


def plan(**changes: Any) -> MixingPlan:
    settings: dict[str, Any] = {
        "retrieval": RETRIEVAL,
        "heterogeneous": HETEROGENEOUS,
        "tasks": np.arange(70) % 3,
        "global_batch": 16,
        "seed": 5,
        "compression_probability": 0.5,
        "config": DataConfig(retrieval_share=0.75),
    }
    return MixingPlan(**(settings | changes))


def order(mixing: MixingPlan, steps: int) -> list[tuple[list[int], list[bool]]]:
    return [(s.rows.tolist(), s.z.tolist()) for s in map(mixing.step, range(steps))]


@pytest.mark.parametrize("sub_batch", [0, 4])
def test_order_depends_on_seed_and_step_alone(sub_batch: int) -> None:
    config = DataConfig(sub_batch=sub_batch)
    first = order(plan(config=config), 40)
    assert order(plan(config=config), 40) == first
    resumed = plan(config=config)
    assert [(s.rows.tolist(), s.z.tolist()) for s in map(resumed.step, (39, 3, 17))] == [first[39], first[3], first[17]]
    assert order(plan(config=config, seed=6), 40) != first


@pytest.mark.parametrize(("temperature", "digest"), [(1.0, "872dbfe877c67f5f"), (2.0, "4b1762b0b844427e")])
def test_the_order_of_a_seed_does_not_change_between_versions(temperature: float, digest: str) -> None:
    """A newer version may resume a run. Source of the digests: version 0.1.0 before its rooms were redesigned."""
    mixing = plan(
        retrieval=np.arange(30),
        heterogeneous=np.arange(30, 40),
        tasks=np.arange(40) % 3,
        config=DataConfig(retrieval_share=0.75, sub_batch=4, source_temperature=temperature),
        chorus_counts=(1, 4, 8),
    )
    found = hashlib.sha256()
    for step in map(mixing.step, range(6)):
        found.update(step.rows.astype(np.int64).tobytes() + step.z.tobytes() + str(step.chorus_tokens).encode())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("sub_batch", [0, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_of_the_ranks_are_the_global_batch(ranks: int, sub_batch: int) -> None:
    mixing = plan(config=DataConfig(sub_batch=sub_batch))
    for step in range(12):
        whole = mixing.step(step)
        parts = [mixing.step(step, rank=r, ranks=ranks) for r in range(ranks)]
        assert {len(p.rows) for p in parts} == {16 // ranks}
        assert np.concatenate([p.rows for p in parts]).tolist() == whole.rows.tolist()
        assert np.concatenate([p.z for p in parts]).tolist() == whole.z.tolist()


def test_every_epoch_holds_every_row_once() -> None:
    """12 retrieval and 4 heterogeneous rows a step: 25 steps are 6 epochs of the one and 5 of the other."""
    mixing = plan()
    steps = [mixing.step(s).rows for s in range(25)]
    counts = np.bincount(np.concatenate(steps), minlength=70)
    assert (counts[RETRIEVAL] == 6).all() and (counts[HETEROGENEOUS] == 5).all()
    streams = np.concatenate([np.sort(s) for s in steps[:5]])
    assert sorted(streams[streams >= 50]) == HETEROGENEOUS.tolist(), "five steps are one epoch of the 20 rows"
    early = np.concatenate(steps[:4])
    assert np.bincount(early[early < 50]).max() == 1, "48 of 50 retrieval rows, none twice"


def test_an_epoch_is_shuffled_anew() -> None:
    mixing = plan(heterogeneous=np.empty(0, dtype=np.int64), global_batch=50)
    first, second = mixing.step(0).rows, mixing.step(1).rows
    assert sorted(first) == sorted(second) == RETRIEVAL.tolist()
    assert first.tolist() != second.tolist() and first.tolist() != RETRIEVAL.tolist()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 4), (0.75, 12), (1.0, 16)])
def test_shares(share: float, expected: int) -> None:
    mixing = plan(config=DataConfig(retrieval_share=share))
    assert {int((mixing.step(s).rows < 50).sum()) for s in range(10)} == {expected}


def test_a_missing_stream_is_made_up_for_by_the_other() -> None:
    none = np.empty(0, dtype=np.int64)
    assert (plan(heterogeneous=none).step(0).rows < 50).all()
    assert (plan(retrieval=none).step(0).rows >= 50).all()


@pytest.mark.parametrize("sub_batch", [3, 4, 8])
def test_sub_batches_are_of_one_task(sub_batch: int) -> None:
    """Whole runs of one task first, each at a multiple of its length; what is left of each task follows."""
    tasks = np.arange(70) % 3
    mixing = plan(global_batch=32, config=DataConfig(sub_batch=sub_batch))
    first_tasks = set()
    for step in range(20):
        of_row = tasks[mixing.step(step).rows]
        whole = sum(np.bincount(of_row) // sub_batch)
        assert whole > 0
        for run in of_row[: whole * sub_batch].reshape(whole, sub_batch):
            assert len(set(run)) == 1
        rest = of_row[whole * sub_batch :]
        assert (np.diff(rest) != 0).sum() == len(set(rest)) - 1 if len(rest) else True, "leftovers stay together"
        first_tasks.add(int(of_row[0]))
    assert first_tasks == {0, 1, 2}, "the runs are shuffled"


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_frequency_of_compression(probability: float) -> None:
    mixing = plan(compression_probability=probability)
    drawn = np.concatenate([mixing.step(s).z for s in range(500)])  # 8,000 draws, standard error 0.005
    assert drawn.mean() == pytest.approx(probability, abs=0.02)


def test_compression_is_independent_of_the_kind_of_row() -> None:
    mixing = plan()
    steps = [mixing.step(s) for s in range(800)]
    rows, z = np.concatenate([s.rows for s in steps]), np.concatenate([s.z for s in steps])
    assert z[rows < 50].mean() == pytest.approx(z[rows >= 50].mean(), abs=0.04)


def test_no_rows_is_an_error_with_the_remedy() -> None:
    none = np.empty(0, dtype=np.int64)
    with pytest.raises(ConfigError, match="manifest"):
        plan(retrieval=none, heterogeneous=none)


def skewed(temperature: float, **changes: Any) -> MixingPlan:
    """Four tasks of 160, 40, 10 and 2 rows."""
    settings: dict[str, Any] = {
        "retrieval": np.arange(212),
        "heterogeneous": np.empty(0, dtype=np.int64),
        "tasks": np.repeat(np.arange(4), SIZES),
        "config": DataConfig(source_temperature=temperature),
    }
    return plan(**(settings | changes))


SIZES = np.array([160, 40, 10, 2])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 1e9])
def test_tasks_come_by_size_to_the_power_of_the_inverse_temperature(temperature: float) -> None:
    mixing = skewed(temperature)
    drawn = np.concatenate([mixing.tasks[mixing.step(s).rows] for s in range(1000)])  # standard error below 0.004
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    expected = SIZES ** (1 / temperature) / (SIZES ** (1 / temperature)).sum()
    assert shares == pytest.approx(expected, abs=0.015)
    if temperature > 100:
        assert shares == pytest.approx(np.full(4, 0.25), abs=0.015), "evenly"


def test_temperature_one_is_the_plan_without_tasks() -> None:
    assert order(skewed(1.0), 30) == order(skewed(1.0, tasks=np.zeros(212, dtype=np.int64)), 30)
    near = np.concatenate([skewed(1.0 + 1e-9).step(s).rows for s in range(500)])
    assert np.bincount(skewed(1.0).tasks[near]) / len(near) == pytest.approx(SIZES / 212, abs=0.02)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 1e9])
def test_every_epoch_of_a_task_holds_its_rows_once(temperature: float) -> None:
    """Whatever is drawn for the others: the rows of a task, in the order of steps, are whole epochs one by one."""
    mixing = skewed(temperature, global_batch=7)
    steps = [mixing.step(s).rows for s in range(400)]
    complete = 0
    for task in range(4):
        members = np.flatnonzero(mixing.tasks == task)
        begun = np.zeros(212, dtype=np.int64)
        for rows in steps:
            np.add.at(begun, rows[mixing.tasks[rows] == task], 1)
            assert begun[members].max() - begun[members].min() <= 1, "no row again before all others came"
        complete += int(begun[members].min())
    assert complete > 10


def test_streams_have_their_own_temperature_and_epochs() -> None:
    """Homogeneous and heterogeneous rows of one task are two streams, in their fixed shares."""
    mixing = plan(config=DataConfig(retrieval_share=0.75, source_temperature=3.0), tasks=np.arange(70) % 2)
    steps = [mixing.step(s).rows for s in range(200)]
    assert {int((rows < 50).sum()) for rows in steps} == {12}
    counts = np.bincount(np.concatenate(steps), minlength=70)
    for members in (np.arange(0, 50, 2), np.arange(1, 50, 2), np.arange(50, 70, 2), np.arange(51, 70, 2)):
        assert counts[members].max() - counts[members].min() <= 1 < counts[members].min()


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("sub_batch", [0, 4])
def test_sampling_and_chorus_counts_do_not_depend_on_the_ranks(ranks: int, sub_batch: int) -> None:
    config = DataConfig(source_temperature=4.0, sub_batch=sub_batch)
    whole = skewed(4.0, config=config, chorus_counts=(1, 2, 4))
    parts = [skewed(4.0, config=config, chorus_counts=(1, 2, 4)) for _ in range(ranks)]  # each rank has its own plan
    for step in range(40):
        expected = whole.step(step)
        got = [mixing.step(step, rank=r, ranks=ranks) for r, mixing in enumerate(parts)]
        assert np.concatenate([p.rows for p in got]).tolist() == expected.rows.tolist()
        assert np.concatenate([p.z for p in got]).tolist() == expected.z.tolist()
        assert {p.chorus_tokens for p in got} == {expected.chorus_tokens}


def test_chorus_counts_are_drawn_evenly() -> None:
    mixing = plan(chorus_counts=(1, 4, 16))
    drawn = [mixing.step(s).chorus_tokens for s in range(1500)]
    counts = {k: drawn.count(k) for k in (1, 4, 16)}
    assert sum(counts.values()) == 1500
    assert list(counts.values()) == pytest.approx([500] * 3, abs=75)  # four standard deviations
    assert drawn != [plan(chorus_counts=(1, 4, 16), seed=6).step(s).chorus_tokens for s in range(1500)]
    rows = [mixing.step(s).rows.tolist() for s in range(20)]
    assert rows == [plan().step(s).rows.tolist() for s in range(20)], "the order of rows does not depend on them"
    for counts_of_one in ((), (16,)):
        assert plan(chorus_counts=counts_of_one).step(3).chorus_tokens is None, "all K"


@pytest.mark.parametrize("seed", range(6))
def test_a_run_resumes_at_any_step(seed: int) -> None:
    """A fresh plan asked for one step alone gives what a plan gives that went through all of them."""
    draw = np.random.default_rng(seed)
    config = DataConfig(
        source_temperature=float(draw.choice([1.0, 2.0, 50.0])),
        sub_batch=int(draw.choice([0, 2, 5])),
        retrieval_share=float(draw.choice([0.5, 0.8])),
    )
    settings: dict[str, Any] = {"config": config, "seed": seed, "chorus_counts": (2, 4), "tasks": np.arange(70) % 5}
    through = plan(**settings)
    steps = [through.step(s) for s in range(120)]
    for step in [0, 1, 119, *draw.integers(0, 120, 8).tolist()]:
        alone = plan(**settings).step(step)
        assert alone.rows.tolist() == steps[step].rows.tolist()
        assert alone.z.tolist() == steps[step].z.tolist() and alone.chorus_tokens == steps[step].chorus_tokens
