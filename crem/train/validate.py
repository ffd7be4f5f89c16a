"""Validation during a run: both losses and in-batch Precision@1 on rows that are not trained on.

The rows are one batch of InfoNCE, gathered from all ranks, so the figures do not depend on the number of workers. Every
row is run twice: with z = 0 its answer comes from the full context (native), with z = 1 from the chorus tokens alone
(compressed). Embeddings are the same in both, because U never depends on z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from crem.config import LossConfig, RunConfig
from crem.data.collator import Batch
from crem.distributed import gather_rows, sum_over_ranks
from crem.losses import lm_loss
from crem.metrics import precision_at_1
from crem.train.callbacks import Callback, Interval, is_due
from crem.train.phases import Phase
from crem.train.progress import ValidationResult
from crem.train.step import retrieval_of

__all__ = ["Validation", "validate"]


class Validation(Callback):
    """Every ``train.validate_every`` steps and after the last; adds its terms to the progress of the interval.

    Args:
        batches: called for each validation; returns the batches of ``validate``.
    """

    def __init__(
        self,
        engine: Any,
        batches: Callable[[], Iterable[tuple[Batch, Batch]]],
        config: RunConfig,
        device: torch.device,
    ):
        self._engine, self._batches, self._config, self._device = engine, batches, config, device

    def due(self, done: int) -> bool:
        return is_due(done, self._config.train.validate_every, self._config.train.steps)

    def on_interval(self, interval: Interval) -> None:
        if self.due(interval.progress.step):
            interval.enter(Phase.VALIDATION)
            terms = validate(self._engine, self._batches(), self._config.loss, self._device)
            interval.progress = replace(interval.progress, validation=terms)


@torch.no_grad()
def validate(
    engine: Any, batches: Iterable[tuple[Batch, Batch]], config: LossConfig, device: torch.device
) -> ValidationResult:
    """Both losses and Precision@1 on held-out rows. A collective; leaves the engine in training mode.

    Args:
        engine: of DeepSpeed, whose forward applies the run's precision.
        batches: this rank's rows in as many batches as on every rank, each with z = 0 and with z = 1.
    """
    engine.eval()
    embeddings, chunks = [], []
    sums = torch.zeros(2, device=device)
    answer_tokens = torch.zeros((), dtype=torch.long, device=device)
    for pair in batches:
        native, compressed = (_for_every_rank(batch, engine).to(device) for batch in pair)
        output = engine(native)
        embeddings.append(output.embeddings)
        sums += torch.stack([output.lm_loss_sum, engine(compressed).lm_loss_sum]).float()
        answer_tokens += output.answer_tokens
        chunks.append(replace(native, pixel_values=None, two_part=None))  # all that InfoNCE needs
    engine.train()
    native_loss, compressed_loss = lm_loss(sum_over_ranks(sums), int(sum_over_ranks(answer_tokens))).tolist()
    retrieval = retrieval_of(torch.cat(embeddings), chunks, config)
    query_keys, target_keys = (
        gather_rows(torch.cat(keys)) for keys in zip(*((c.query_keys, c.target_keys) for c in chunks), strict=True)
    )
    share = config.compression_probability
    return ValidationResult(
        loss=config.alpha_r * float(retrieval.loss)
        + config.alpha_g * ((1 - share) * native_loss + share * compressed_loss),
        retrieval=float(retrieval.loss),
        precision_at_1=precision_at_1(retrieval.queries_QD, retrieval.targets_QD, query_keys, target_keys),
        generation_native=native_loss,
        generation_compressed=compressed_loss,
    )


def _for_every_rank(batch: Batch, engine: Any) -> Batch:
    """Under ZeRO-3 every rank must run the vision tower, also one whose rows have no image."""
    blank: Batch = engine.module.with_blank_image(batch) if batch.pixel_values is None else batch
    return blank
