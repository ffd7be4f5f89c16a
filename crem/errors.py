"""Errors that a person can act on.

Each message names the value, the limit and the remedy. All of them pickle, because they cross Ray
processes: an exception is rebuilt from ``args``, so every class passes all of its fields to
``super().__init__``.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CremError",
    "DivergenceError",
    "ItemError",
    "ResourceError",
    "StorageError",
    "TrainingError",
    "shortened",
]

_MAX_NAME = 200
_MAX_DETAIL = 300


class CremError(Exception):
    """Base of every error whose message is meant for the user; the command line prints it without a traceback."""


class ConfigError(CremError):
    """A configuration, preset or argument that cannot be used."""


class CheckpointError(CremError):
    """A checkpoint that is missing, damaged or of another kind."""


class ResourceError(CremError):
    """Too little memory, disk or too few devices for the job."""


class StorageError(CremError):
    """Storage that did not answer for as long as the job may wait, or does not let it in. No row is at fault. The job
    continues when it is run again.

    Attributes:
        transient: whether the same call may succeed later: a refused connection, a time-out, a status of 5xx. Wrong
            credentials and a missing bucket stay as they are.
    """

    def __init__(self, message: str, transient: bool = True):
        super().__init__(message, transient)
        self.message, self.transient = message, transient

    def __str__(self) -> str:
        return self.message


class TrainingError(CremError):
    """A run that cannot go on: a loss that is not finite, a worker that failed more often than allowed."""


class DivergenceError(TrainingError):
    """The loss of a step is not finite, or has exploded. The driver saves the rows of the step.

    Attributes:
        step: the step whose loss it is, counted from 0.
        ranks: workers that shared its global batch.
        terms: the loss and its terms by name.
    """

    def __init__(self, message: str, step: int, ranks: int, terms: dict[str, float]):
        super().__init__(message, step, ranks, terms)
        self.message, self.step, self.ranks, self.terms = message, step, ranks, terms

    def __str__(self) -> str:
        return self.message


class ItemError(CremError):
    """One item or row that cannot be used. Batch jobs turn it into a counted row; the public face raises it.

    Attributes:
        reason: machine-readable code, e.g. ``empty_item``, ``image_missing``, ``image_corrupt``,
            ``image_too_large``, ``uri_refused``, ``text_too_long``.
        detail: the value, the limit and the remedy in words; at most 300 characters, because a corpus may have a
            million such rows.
    """

    def __init__(self, reason: str, detail: str):
        detail = shortened(detail, _MAX_DETAIL)
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def shortened(text: str, limit: int = _MAX_NAME) -> str:
    """``text`` in full up to ``limit`` characters; a longer one keeps its head and tail, and says what is left out."""
    if len(text) <= limit:
        return text
    mark = f"…[{len(text)} characters]…"
    kept = limit - len(mark)
    return f"{text[: kept - kept // 3]}{mark}{text[len(text) - kept // 3 :]}"
