"""Asking about one row until there is a valid answer, a reason to give up, or a reason to end the job.

Three kinds of failure are told apart:

- *The answer is invalid* (no JSON, another form, cut off): asked again, ``synthesise.attempts`` times in all; then the
  row stays without a question, with the reason.
- *The endpoint is busy or away* (429, timeout, 5xx, broken connection): asked again with growing pauses, for as long as
  anyone gets answers, or ``synthesise.away_s`` without one; then the job ends, and goes on when it is run again.
- *This request brings the server down* (it fails time after time, and a smaller request does not): the row stays
  without a question. Without the smaller request a single image could end the job at every run.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from crem.config import SynthesiseConfig
from crem.errors import ItemError, ResourceError
from pipelines.synthesis.endpoint import Completion, EndpointAwayError, EndpointBusyError, RequestRefusedError
from pipelines.synthesis.meter import MeterClient, Spent
from pipelines.synthesis.question_answers import QuestionAnswer, parse_answer
from pipelines.synthesis.question_prompt import Message

__all__ = ["Asked", "Asker", "ask", "checked"]

_LONGEST_PAUSE_S = 60.0
_FAILURES_BEFORE_PROBE = 8
"""Failures of one request after which the endpoint itself is tried. Source: ours; the pauses add up to minutes."""


class Asker(Protocol):
    """What ``Endpoint`` does."""

    async def complete(self, messages: Sequence[Message]) -> Completion: ...
    async def probe(self) -> bool: ...


@dataclass(frozen=True)
class Asked:
    """What came of one row."""

    pairs: tuple[QuestionAnswer, ...]
    reason: str | None
    """Why there are none; None where there are."""
    detail: str | None
    spent: Spent
    seconds: float


async def ask(
    messages: Sequence[Message],
    wanted: int,
    kinds: Sequence[str],
    *,
    endpoint: Asker,
    meter: MeterClient,
    config: SynthesiseConfig,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    jitter: Callable[[], float] = random.random,
) -> Asked:
    """Ask for ``wanted`` pairs, each of one of ``kinds``.

    Raises:
        BoundReachedError: a bound forbids a further request; what was asked so far is counted by the meter.
        ConfigError, ResourceError: no request can succeed; the job ends.
    """
    began, spent = time.monotonic(), Spent()
    invalid = failures = 0

    def done(pairs: tuple[QuestionAnswer, ...], reason: str | None = None, detail: str | None = None) -> Asked:
        return Asked(pairs, reason, detail, spent, time.monotonic() - began)

    while True:
        outcome, cost = await _send(messages, endpoint, meter)
        spent += cost
        if isinstance(outcome, Completion):
            try:
                return done(checked(outcome, kinds, wanted))
            except ItemError as error:
                invalid += 1
                if invalid >= config.attempts or error.reason == "refused":
                    return done((), error.reason, error.detail)
            continue
        if isinstance(outcome, RequestRefusedError):
            return done((), "request_refused", str(outcome))
        failures += 1
        pause_s = _pause_s(outcome, failures, jitter())
        if not isinstance(outcome, EndpointAwayError):
            await meter.pause(pause_s)
        elif failures >= _FAILURES_BEFORE_PROBE and await endpoint.probe():
            return done((), "server_error", str(outcome))
        if (silent_s := await meter.silent_s()) > config.away_s:
            raise ResourceError(
                f"no answer for {silent_s:.0f} s: {outcome}; when the endpoint is back, run the same command again: it "
                "asks only what has no answer yet (synthesise.away_s is how long it waits)"
            )
        await sleep(pause_s)


async def _send(
    messages: Sequence[Message], endpoint: Asker, meter: MeterClient
) -> tuple[Completion | EndpointBusyError | RequestRefusedError, Spent]:
    """The outcome of one request, and what it cost."""
    request = await meter.admit()
    spent, answered = Spent(1), False
    outcome: Completion | EndpointBusyError | RequestRefusedError
    try:
        outcome = await endpoint.complete(messages)
        spent, answered = Spent(1, outcome.prompt_tokens, outcome.answer_tokens), True
    except (EndpointBusyError, RequestRefusedError) as error:
        outcome, answered = error, isinstance(error, RequestRefusedError)
    finally:
        await meter.settle(request, spent, answered=answered)
    return outcome, spent


def checked(completion: Completion, kinds: Sequence[str], wanted: int) -> tuple[QuestionAnswer, ...]:
    """The ``wanted`` pairs of an answer. Raises ``ItemError`` with the reason where they are not valid."""
    if completion.refused:
        raise ItemError("refused", f"the model declined: {completion.text[:120]!r}")
    try:
        return parse_answer(completion.text, kinds, wanted)
    except ItemError as error:
        if completion.cut:
            raise ItemError(
                "cut_off",
                f"the answer was cut at {completion.answer_tokens} tokens; raise synthesise.max_answer_tokens",
            ) from error
        raise


def _pause_s(failure: EndpointBusyError, failures: int, jitter: float) -> float:
    """What the server asks for, else doubling pauses; up to half as much again, so that not all return at once."""
    asked = failure.pause_s if failure.pause_s is not None else min(_LONGEST_PAUSE_S, 2.0 ** (failures - 1))
    return asked * (1 + jitter / 2)
