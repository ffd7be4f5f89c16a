"""The training step: both losses, one update (method.md §4), over a batch that may be far larger than memory.

Scale. Every rank computes the same InfoNCE over the gathered global batch, with gradient through its own embeddings
only, and its own share of the LM loss, divided by the *global* number of answer tokens. The sum of the ranks' gradients
is then that of one process with the whole batch. DeepSpeed averages gradients over ranks, so the loss is multiplied by
the number of ranks before the backward pass.

Gradient caching (GradCache, arXiv 2101.06983). A rank's share comes in chunks. With more than one, all chunks are
embedded without gradient first; InfoNCE over the gathered embeddings gives the gradient of each embedding; then every
chunk is run once more, with gradient, and its surrogate (cached gradient times embedding) is backpropagated together
with its share of the LM loss. Chunks are DeepSpeed's own micro-batches (``gradient_accumulation_steps``), which it
averages, so each is multiplied by their number. ZeRO 0 and 1 reduce gradients once a step, with the last chunk; ZeRO 2
and 3 store only their part of the gradients and must reduce with each.

Both passes of a chunk draw the same dropout, because both start from the chunk's seed; z is part of the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crem.config import LossConfig
from crem.data.collator import Batch
from crem.distributed import gather_rows, sum_over_ranks, world_size
from crem.losses import info_nce, joint_loss, lm_loss
from crem.metrics import alignment, uniformity
from crem.model.crem import CremOutput

__all__ = ["Retrieval", "StepResult", "TrainEngine", "retrieval_of", "train_step"]


class TrainEngine(Protocol):
    """What a step needs of ``deepspeed.DeepSpeedEngine`` (or of a plain stand-in in a test)."""

    def __call__(self, batch: Batch, *, embed_only: bool = False) -> CremOutput: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...


@dataclass(frozen=True)
class StepResult:
    """Terms of the global batch, the same on every rank."""

    loss: float
    retrieval: float
    generation: float
    answer_tokens: int
    alignment: float
    uniformity: float


# ------------------------------------------------------------------------------------------------- the training step


def train_step(
    engine: TrainEngine,
    chunks: Sequence[Batch],
    config: LossConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> StepResult:
    """One optimizer step over this rank's share of the global batch.

    Args:
        chunks: this rank's rows in order, the same number of chunks on every rank. They may be in host memory; each is
            on ``device`` only while it runs.
        seed: of this step and rank; chunk i draws its dropout from ``seed + i``.
    """
    ranks = world_size()
    answer_tokens = int(sum_over_ranks(torch.stack([chunk.answer_tokens for chunk in chunks]).sum().to(device)))
    if len(chunks) == 1:
        torch.manual_seed(seed)
        output = engine(chunks[0].to(device))
        retrieval = retrieval_of(output.embeddings, chunks, config)
        generation = lm_loss(output.lm_loss_sum, answer_tokens)
        engine.backward(joint_loss(retrieval.loss, generation, config) * ranks)
        engine.step()
        return _result(retrieval, generation, answer_tokens, config)

    embeddings = []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            torch.manual_seed(seed + number)
            embeddings.append(engine(chunk.to(device), embed_only=True).embeddings)
    cached_ND = torch.cat(embeddings).requires_grad_()
    retrieval = retrieval_of(cached_ND, chunks, config)
    retrieval.loss.backward()
    assert cached_ND.grad is not None

    generation = torch.zeros_like(retrieval.loss)
    gradients = cached_ND.grad.split([len(part) for part in embeddings])
    for number, (chunk, gradient_ND) in enumerate(zip(chunks, gradients, strict=True)):
        torch.manual_seed(seed + number)
        output = engine(chunk.to(device))
        surrogate, share = (output.embeddings * gradient_ND).sum(), lm_loss(output.lm_loss_sum, answer_tokens)
        engine.backward(joint_loss(surrogate, share, config) * ranks * len(chunks))
        engine.step()
        generation += share.detach()
    return _result(retrieval, generation, answer_tokens, config)


# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """InfoNCE of the global batch, and the embeddings it was computed from."""

    loss: Tensor
    queries_QD: Tensor
    targets_QD: Tensor


def retrieval_of(embeddings_ND: Tensor, chunks: Sequence[Batch], config: LossConfig) -> Retrieval:
    """L_r of the global batch from this rank's embeddings, which are those of its chunks, concatenated."""
    queries, targets, negatives, start = [], [], [], 0
    for chunk in chunks:
        queries.append(chunk.queries + start)
        targets.append(chunk.targets + start)
        negatives.append(chunk.negatives + start)
        start += len(chunk.z)
    device = embeddings_ND.device
    queries_QD, targets_QD, negatives_ND = (
        gather_rows(embeddings_ND[torch.cat(places).to(device)]) for places in (queries, targets, negatives)
    )
    query_keys_Q, target_keys_Q, negative_keys_N = (
        gather_rows(torch.cat(keys).to(device))
        for keys in zip(*((c.query_keys, c.target_keys, c.negative_keys) for c in chunks), strict=True)
    )
    loss = info_nce(
        queries_QD,
        torch.cat([targets_QD, negatives_ND]),
        query_keys=query_keys_Q,
        candidate_keys=torch.cat([target_keys_Q, negative_keys_N]),
        temperature=config.temperature,
        symmetric=config.symmetric,
        margin=config.false_negative_margin,
    )
    return Retrieval(loss, queries_QD.detach(), targets_QD.detach())


def _result(retrieval: Retrieval, generation: Tensor, answer_tokens: int, config: LossConfig) -> StepResult:
    generation = sum_over_ranks(generation)
    return StepResult(
        loss=float(joint_loss(retrieval.loss.detach(), generation, config)),
        retrieval=float(retrieval.loss.detach()),
        generation=float(generation),
        answer_tokens=answer_tokens,
        alignment=alignment(retrieval.queries_QD, retrieval.targets_QD),
        uniformity=uniformity(torch.cat([retrieval.queries_QD, retrieval.targets_QD])),
    )
