"""Ends a run whose loss is not finite or has exploded."""

from __future__ import annotations

import math
import statistics
from collections import deque

from crem.distributed import world_size
from crem.errors import DivergenceError
from crem.train.callbacks import Callback
from crem.train.step import StepResult

__all__ = ["LossGuard"]

_WINDOW = 100
"""Steps over which the median is taken. Source: ours."""
_MIN_STEPS = 20
"""Losses to collect before one is judged, also after a resume. Source: ours."""
_FLOOR = 1.0
"""Nats below which no loss has exploded: late in a run the median can be near 0, and ten times that is still little."""


class LossGuard(Callback):
    """Checks the loss of every step. The loss is that of the global batch, so all ranks decide alike.

    Args:
        factor: a loss above this times the running median is an explosion; None checks only that losses are finite.
        warmup_steps: steps in which a loss may rise without limit.
    """

    def __init__(self, factor: float | None, warmup_steps: int):
        self._factor, self._warmup_steps = factor, warmup_steps
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def on_step(self, step: int, result: StepResult) -> None:
        """Check the loss of ``step`` and remember it.

        Raises:
            DivergenceError: it is not finite, or has exploded.
        """
        terms = {"loss": result.loss, "retrieval": result.retrieval, "generation": result.generation}
        message = f"the loss of step {step} is {result.loss:g} (retrieval {result.retrieval:g}, generation "
        message += f"{result.generation:g})"
        if not math.isfinite(result.loss):
            raise DivergenceError(
                f"{message}; start a new run with a lower optim.lr, a longer optim.warmup_steps or a higher "
                "loss.temperature, or prepare the data without the rows of this step if they are broken",
                *(step, world_size(), terms),
            )
        if self._factor is not None and step >= self._warmup_steps and len(self._losses) >= _MIN_STEPS:
            median = statistics.median(self._losses)
            if result.loss > max(self._factor * median, _FLOOR):
                raise DivergenceError(
                    f"{message}, over train.explosion_factor={self._factor:g} times {median:.3g}, the median of the "
                    f"last {len(self._losses)} steps; start again with a lower optim.lr or longer optim.warmup_steps, "
                    "or continue with --resume and a higher train.explosion_factor (null lets every loss pass)",
                    *(step, world_size(), terms),
                )
        self._losses.append(result.loss)
