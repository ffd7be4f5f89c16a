"""Losses: closed forms, gradients, false negatives, global reduction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from crem.config import load_config
from crem.losses import info_nce, joint_loss, lm_loss


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def no_keys(queries: int, candidates: int) -> dict[str, torch.Tensor]:
    return {"query_keys": torch.full((queries,), -1), "candidate_keys": torch.full((candidates,), -1)}


def test_info_nce_of_equal_similarities_is_log_candidates() -> None:
    same = F.normalize(torch.ones(4, 8), dim=-1)
    assert info_nce(same, same, **no_keys(4, 4), temperature=0.1).item() == pytest.approx(math.log(4), abs=1e-5)


def test_info_nce_closed_form_of_orthogonal_pairs() -> None:
    eye = torch.eye(5)
    expected = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 4))
    for symmetric in (False, True):
        loss = info_nce(eye, eye, **no_keys(5, 5), temperature=0.5, symmetric=symmetric)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_info_nce_takes_hard_negatives_and_symmetric_direction() -> None:
    q, c = unit(3, 6), unit(5, 6, seed=1)
    logits = q @ c.T / 0.1
    one_sided = sum(-logits[i].log_softmax(0)[i] for i in range(3)) / 3
    back = sum(-logits[:, i].log_softmax(0)[i] for i in range(3)) / 3
    torch.testing.assert_close(info_nce(q, c, **no_keys(3, 5), temperature=0.1), one_sided)
    torch.testing.assert_close(info_nce(q, c, **no_keys(3, 5), temperature=0.1, symmetric=True), (one_sided + back) / 2)


@pytest.mark.parametrize(
    ("query_keys", "candidate_keys", "keep"),
    [
        ([1, 2, 3], [7, 7, 9, -1], [[0, 2, 3], [1, 2, 3], [0, 1, 2, 3]]),  # targets of equal content
        ([5, 6, 5], [7, 8, 9, -1], [[0, 1, 3], [0, 1, 2, 3], [1, 2, 3]]),  # targets of equal queries
        ([1, 2, 3], [7, 8, 9, 8], [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3]]),  # a hard negative of the target's content
        ([-1, -1, -1], [-1, -1, -1, -1], [[0, 1, 2, 3]] * 3),
    ],
)
def test_info_nce_leaves_out_false_negatives(
    query_keys: list[int], candidate_keys: list[int], keep: list[list[int]]
) -> None:
    q, c = unit(3, 6), unit(4, 6, seed=1)
    keys = {"query_keys": torch.tensor(query_keys), "candidate_keys": torch.tensor(candidate_keys)}
    loss = info_nce(q, c, **keys, temperature=0.1)
    logits = q @ c.T / 0.1
    expected = sum(logits[i][keep[i]].logsumexp(0) - logits[i, i] for i in range(3)) / 3
    torch.testing.assert_close(loss, expected)


def test_info_nce_leaves_out_what_is_nearer_than_the_target_by_a_margin() -> None:
    angles = torch.tensor([0.6, 0.0, 0.5, 1.5])  # the query is at 0, its target at 0.6
    c = torch.stack([angles.cos(), angles.sin()], 1)
    q = torch.tensor([[1.0, 0.0]])
    logits = (q @ c.T / 0.1)[0]
    for margin, keep in ((0.1, [0, 2, 3]), (0.0, [0, 3]), (0.5, [0, 1, 2, 3])):
        loss = info_nce(q, c, **no_keys(1, 4), temperature=0.1, margin=margin)
        torch.testing.assert_close(loss, logits[keep].logsumexp(0) - logits[0])


def test_info_nce_gradient() -> None:
    q, c = unit(3, 4, dtype=torch.float64).requires_grad_(), unit(5, 4, seed=1, dtype=torch.float64).requires_grad_()
    keys = torch.tensor([1, 1, 2, -1, -1])
    for symmetric in (False, True):
        assert torch.autograd.gradcheck(
            lambda a, b, s=symmetric: info_nce(
                a, b, query_keys=torch.tensor([1, 2, 1]), candidate_keys=keys, temperature=0.2, symmetric=s, margin=0.3
            ),
            (q, c),
        )


def test_info_nce_without_queries_is_a_zero_that_can_be_differentiated() -> None:
    q = torch.zeros(0, 4, requires_grad=True)
    loss = info_nce(q, q, **no_keys(0, 0), temperature=0.1)
    loss.backward()
    assert loss.item() == 0


def test_lm_loss_is_reduced_over_the_global_tokens() -> None:
    """Two ranks with 1 and 3 tokens: their shares add up to the mean over 4, not to the mean of means."""
    nll = torch.tensor([8.0, 1.0, 2.0, 3.0])
    shares = lm_loss(nll[:1].sum(), 4) + lm_loss(nll[1:].sum(), 4)
    assert shares.item() == pytest.approx(nll.mean().item())
    assert lm_loss(torch.tensor(0.0), 0).item() == 0


def test_joint_loss_weighs_its_terms() -> None:
    config = load_config("micro", ["loss.alpha_r=2", "loss.alpha_g=0.5"]).loss
    assert joint_loss(torch.tensor(3.0), torch.tensor(4.0), config).item() == 8.0
