"""The items of a window one by one in a process apart that has a model of its own: careful embedding.

For a window whose actor has died again and again, and for one of which a forward failed. The actor gives its own model
back meanwhile, so that the device holds one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch

from crem.data.sequence import PreparedSequence
from crem.errors import CremError, ItemError
from crem.model.encoding import Encoded
from pipelines.embedding.deadlines import deadline
from pipelines.embedding.isolated_calls import IsolatedCalls
from pipelines.embedding.result_columns import ResultColumns

__all__ = ["embed_alone", "lost_device"]


def embed_alone(
    sequences: Sequence[PreparedSequence],
    *,
    results: ResultColumns,
    model: str,
    chorus_tokens: int | None,
    device: str,
    threads: int,
    timeout_s: float,
    attempts: int,
) -> list[Encoded | ItemError]:
    """What the model gives of each sequence, or why there is nothing.

    Raises:
        ResourceError: the process apart does not start. Exception: as the first forward raised it, if all did.
    """
    calls = IsolatedCalls(
        partial(_serve, results, model, chorus_tokens, device, threads, timeout_s),
        timeout_s=timeout_s,
        attempts=attempts,
        doing="embedding the item",
    )
    found: list[Encoded | ItemError] = []
    raised: list[Exception] = []
    with calls:
        for sequence in sequences:
            try:
                found.append(calls(sequence))
            except ItemError as error:
                found.append(error)
            except CremError:
                raise
            except Exception as error:
                raised.append(error)
                found.append(ItemError("unexpected_error", f"{type(error).__name__}: {error}"))
    if raised and len(raised) == len(sequences):
        raise raised[0]  # the model, not the items
    return found


def lost_device(error: BaseException) -> bool:
    """Whether the device is lost to this process, as after an illegal access; only a new process gets it back."""
    return isinstance(error, torch.AcceleratorError) and "out of memory" not in str(error).lower()


def _serve(
    results: ResultColumns, model: str, chorus_tokens: int | None, device: str, threads: int, timeout_s: float
) -> Callable[[PreparedSequence], Encoded]:
    """In the process apart: the model, and what embeds one sequence."""
    import crem

    torch.set_num_threads(threads)
    loaded = crem.load(model, device=device, chorus_tokens=chorus_tokens)

    def embed(sequence: PreparedSequence) -> Encoded:
        try:
            with deadline(timeout_s):
                return results.encode(loaded, [sequence])
        except RuntimeError as error:
            if lost_device(error):
                os._exit(1)
            raise

    return embed
