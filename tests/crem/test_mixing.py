"""The order of rows: a pure function of seed and step, whole epochs, equal slices for every number of ranks."""

from __future__ import annotations

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
