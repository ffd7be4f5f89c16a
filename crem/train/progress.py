"""The figures of a run at each log interval: plain values that travel from the workers to the driver.

Rates, waiting and padding are those of the interval since the last line, summed over all ranks. Losses, learning rate,
gradient norm, uniformity and alignment are those of the interval's last step, whose value does not depend on where the
interval began, so a resumed run repeats it exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Progress", "ValidationResult"]


@dataclass(frozen=True)
class ValidationResult:
    """Terms over all held-out rows, the same on every rank."""

    loss: float
    """what training minimises, in expectation over z: the measure by which the best model is kept"""
    retrieval: float
    """InfoNCE; 0 without pairs"""
    precision_at_1: float
    """share of queries whose nearest target is their own or one of the same content; NaN without pairs"""
    generation_native: float
    """per answer token, from the full context; 0 without answers"""
    generation_compressed: float
    """per answer token, from the chorus tokens alone"""

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """One line of metrics; all terms are those of the global batch."""

    step: int
    """finished steps"""
    loss: float
    retrieval: float
    generation: float
    answer_tokens: int
    alignment: float
    uniformity: float
    temperature: float
    lr: float
    grad_norm: float
    """before clipping"""
    samples_per_s: float
    tokens_per_s: float
    """tokens of the language model, without padding, over all ranks"""
    flops_utilisation: float
    """model FLOPs per second over the peak of all devices (``crem.forecast.flops``)"""
    peak_flops: float
    """FLOP/s of all devices, the denominator of ``flops_utilisation``"""
    waiting_share: float
    """share of the time in which ranks waited for their rows"""
    padding_share: float
    seconds_left: float
    cut_share: float = 0.0
    """share of the sequences that lost the end of a text to its limit of tokens"""
    validation: ValidationResult | None = None
    """where the step was validated"""

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name; those of validation as ``validation/…``."""
        plain = asdict(self)
        terms = plain.pop("validation") or {}
        return plain | {f"validation/{name}": value for name, value in terms.items()}
