"""N ranks = one process with the whole batch: terms, gradients and weights, with ranks that hold different things.

Each rank takes its share at once and in two chunks (gradient caching); the one process never does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crem.distributed import gather_rows, rank, sum_over_ranks, world_size
from tests.crem.train.runs import CASES, assert_same, spawn, trained

CHUNKS = {2: (1, 2), 4: (2,)}
"""By number of ranks, in how many chunks each takes its share; four ranks of two chunks have one row in each."""


def on_each_rank(number: int, folder: Path) -> None:
    """What a spawned rank does: all cases in turn, to start the processes once."""
    ranks = dist.get_world_size()
    results: dict[str, Any] = {
        f"{case}, chunks: {chunks}": trained(case, rank=number, ranks=ranks, chunks=chunks)
        for case in CASES
        for chunks in CHUNKS[ranks]
    }
    if number:  # gradients are summed over the ranks: the same everywhere, and large
        for result in results.values():
            del result["gradients"]
    if ranks == 2:
        results |= collectives(number)
    torch.save(results, folder / f"rank{number}.pt")


def collectives(number: int) -> dict[str, Any]:
    """What the collectives return to one of two ranks."""
    results: dict[str, Any] = {}
    rows = torch.arange(3.0 * (number + 1)).reshape(-1, 3).add(10 * number).requires_grad_()  # 1 row, then 2
    gathered = gather_rows(rows)
    (gathered * torch.arange(9.0).reshape(3, 3)).sum().backward()
    results["gathered"] = gathered.detach()
    results["gradient"] = rows.grad
    results["empty"] = gather_rows(torch.zeros(2 * number, 3)).shape
    results["nothing"] = gather_rows(torch.zeros(0, 3)).shape
    results["keys"] = gather_rows(torch.tensor([number + 5]))
    results["world"] = (rank(), world_size(), sum_over_ranks(torch.tensor(number + 1)))
    return results


def spawned(folder: Path, ranks: int) -> list[dict[str, Any]]:
    spawn(on_each_rank, ranks, folder)
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(ranks)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(tmp_path_factory.mktemp("four"), 4)


@cache
def one_process(case: str) -> dict[str, Any]:
    return trained(case)


def test_gather_rows_of_uneven_ranks(two_ranks: list[dict[str, Any]]) -> None:
    expected = torch.tensor([[0.0, 1, 2], [10, 11, 12], [13, 14, 15]])
    for number, result in enumerate(two_ranks):
        assert torch.equal(result["gathered"], expected)
        weights = torch.arange(9.0).reshape(3, 3)
        assert torch.equal(result["gradient"], weights[:1] if number == 0 else weights[1:]), "own rows only"
        assert result["empty"] == (2, 3) and result["nothing"] == (0, 3)
        assert result["keys"].tolist() == [5, 6]
        assert result["world"] == (number, 2, torch.tensor(3))


def test_without_a_process_group_the_collectives_do_nothing() -> None:
    rows = torch.randn(2, 3, requires_grad=True)
    assert gather_rows(rows) is rows and (rank(), world_size()) == (0, 1)
    total = sum_over_ranks(rows)
    assert torch.equal(total, rows) and not total.requires_grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("ranks", "chunks"), [("two_ranks", 1), ("two_ranks", 2), ("four_ranks", 2)])
def test_ranks_are_one_process(request: pytest.FixtureRequest, ranks: str, chunks: int, case: str) -> None:
    results = [result[f"{case}, chunks: {chunks}"] for result in request.getfixturevalue(ranks)]
    assert_same(results[0], one_process(case))
    for result in results[1:]:
        assert torch.equal(result["terms"], results[0]["terms"])
        assert all(torch.equal(w, results[0]["weights"][n]) for n, w in result["weights"].items())
