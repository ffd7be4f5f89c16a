"""THE training step: one forward, both losses, one backward, one update (method.md section 4).

Scale. Every rank computes the same InfoNCE over the gathered global batch, with gradient through its own embeddings
only, and its own share of the LM loss, divided by the *global* number of answer tokens. The sum of the ranks' gradients
is then that of one process with the whole batch. DeepSpeed averages gradients over ranks, so the loss is multiplied by
the number of ranks before the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crem.config import LossConfig
from crem.data.collator import Batch
from crem.distributed import gather_rows, sum_over_ranks, world_size
from crem.losses import Losses, info_nce, joint_loss, lm_loss
from crem.model.crem import CremOutput

__all__ = ["Engine", "StepResult", "crem_losses", "train_step"]


class Engine(Protocol):
    """What a step needs of ``deepspeed.DeepSpeedEngine`` (or of a plain stand-in in a test)."""

    def __call__(self, batch: Batch) -> CremOutput: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...


@dataclass(frozen=True)
class StepResult:
    """Terms of the global batch, the same on every rank."""

    loss: float
    retrieval: float
    generation: float
    answer_tokens: int


# ------------------------------------------------------------------------------------------------- the training step


def train_step(engine: Engine, batch: Batch, config: LossConfig) -> StepResult:
    """One optimizer step over this rank's share of the global batch."""
    output = engine(batch)
    losses, answer_tokens = crem_losses(output, batch, config)
    engine.backward(losses.total * world_size())
    engine.step()
    generation = sum_over_ranks(losses.generation)
    total = joint_loss(losses.retrieval.detach(), generation, config).total
    return StepResult(float(total), float(losses.retrieval.detach()), float(generation), answer_tokens)


# --------------------------------------------------------------------------------------------------------------------


def crem_losses(output: CremOutput, batch: Batch, config: LossConfig) -> tuple[Losses, int]:
    """L_r of the global batch, this rank's share of L_g, their weighted sum; and the global number of answer tokens."""
    count = batch.queries.shape[0]
    targets, negatives = batch.candidates[:count], batch.candidates[count:]
    queries_QD = gather_rows(output.embeddings[batch.queries])
    candidates_CD = torch.cat([gather_rows(output.embeddings[targets]), gather_rows(output.embeddings[negatives])])
    keys_C = torch.cat([gather_rows(batch.candidate_keys[:count]), gather_rows(batch.candidate_keys[count:])])
    retrieval = info_nce(queries_QD, candidates_CD, keys_C, temperature=config.temperature, symmetric=config.symmetric)
    answer_tokens = int(sum_over_ranks(output.answer_tokens))
    generation = lm_loss(output.lm_loss_sum, answer_tokens)
    return joint_loss(retrieval, generation, config), answer_tokens
