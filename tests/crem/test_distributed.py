"""N ranks = one process with the whole batch: losses, gradients and weights, with ranks that hold different things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crem.checkpoint import build_model
from crem.distributed import gather_rows, rank, sum_over_ranks, world_size
from crem.train.step import train_step
from tests.conftest import TEXTS, lively
from tests.crem.runs import CASES, STEPS, PlainEngine, run_config, share, spawn


def three_steps(case: str, number: int, ranks: int) -> dict[str, Any]:
    """Losses of each step, gradients of the first, weights after the last."""
    config = run_config()
    model, collator = build_model(config.model, texts=TEXTS)
    lively(model)
    engine = PlainEngine(model.train(), config)
    losses, gradients = [], {}
    for step in range(STEPS):
        batch = share(collator, case, step, number, ranks)
        result = train_step(engine, batch, config.loss)
        losses.append([result.loss, result.retrieval, result.generation, result.answer_tokens])
        gradients = gradients or engine.gradients
    return {"losses": torch.tensor(losses, dtype=torch.float64), "gradients": gradients, "weights": model.state_dict()}


def on_each_rank(number: int, folder: Path) -> None:
    """What a spawned rank does: all cases in turn, to start the processes once."""
    results: dict[str, Any] = {case: three_steps(case, number, dist.get_world_size()) for case in CASES}
    rows = torch.arange(3.0 * (number + 1)).reshape(-1, 3).add(10 * number).requires_grad_()  # 1 row, then 2
    gathered = gather_rows(rows)
    (gathered * torch.arange(9.0).reshape(3, 3)).sum().backward()
    results["gathered"] = gathered.detach()
    results["gradient"] = rows.grad
    results["empty"] = gather_rows(torch.zeros(2 * number, 3)).shape
    results["nothing"] = gather_rows(torch.zeros(0, 3)).shape
    results["keys"] = gather_rows(torch.tensor([number + 5]))
    results["world"] = (rank(), world_size(), sum_over_ranks(torch.tensor(number + 1)))
    torch.save(results, folder / f"rank{number}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(on_each_rank, 2, folder)
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in (0, 1)]


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
def test_two_ranks_are_one_process(two_ranks: list[dict[str, Any]], case: str) -> None:
    whole = three_steps(case, 0, 1)
    assert max(abs(g).max() for g in whole["gradients"].values()) > 1e-2, "there is something to compare"
    for result in two_ranks:
        torch.testing.assert_close(result[case]["losses"], whole["losses"], atol=0, rtol=1e-5)
        for name, gradient in whole["gradients"].items():
            scale = max(float(gradient.abs().max()), 1e-2)
            difference = float((result[case]["gradients"][name] - gradient).abs().max())
            assert difference < 1e-5 * scale, (name, difference, scale)
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(result[case]["weights"][name], weight, atol=1e-5, rtol=1e-5, msg=name)
    assert all(torch.equal(a, two_ranks[1][case]["weights"][n]) for n, a in two_ranks[0][case]["weights"].items())
