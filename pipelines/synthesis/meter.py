"""The one place that counts requests, tokens and money of a run: bounds hold over all workers together.

A worker asks ``admit`` before each request and tells ``settle`` what came of it. The meter lets a request go when fewer
than ``concurrency`` are in flight, the rate allows it, no pause is on, and the bounds cannot be passed: for each
request in flight it reserves as much as the dearest one so far has cost. It lives in one Ray actor (two calls of about
a millisecond per request), and its state is plain numbers, so it is tested without Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import ray

from crem.config import SynthesiseConfig

__all__ = ["BoundReachedError", "Meter", "MeterClient", "RemoteMeter", "Spent", "start_meter"]

_LONGEST_PAUSE_S = 300.0
"""A ``Retry-After`` beyond it is cut: the next request asks again. Source: ours."""
_FIRST_PROMPT_TOKENS = 2_000
"""Reserved for the prompt of a request before any has come back. Source: ours, an image of a megapixel and rules."""

_ROWS_BEFORE_JUDGEMENT = 50
"""Rows done before ``synthesise.max_failed_share`` counts. Source: ours."""
_LOST_AFTER_S = 60.0
"""A request that is not settled so long after its timeout belongs to a worker that died."""


@dataclass(frozen=True)
class Spent:
    """What requests have cost."""

    requests: int = 0
    """Requests that were sent, those without an answer included."""
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def cost(self, config: SynthesiseConfig) -> float:
        """In the currency of the prices."""
        return (self.prompt_tokens * config.input_price + self.answer_tokens * config.output_price) / 1e6

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
        )

    def times(self, count: int) -> Spent:
        return Spent(self.requests * count, self.prompt_tokens * count, self.answer_tokens * count)


class BoundReachedError(Exception):
    """A bound of ``synthesise`` would be passed by one more request; the message names it."""


@dataclass(frozen=True)
class MeterReading:
    """The state of a run, for its log."""

    spent: Spent
    rows: int
    """Rows done in this run."""
    failed: int
    """Rows of these that stay without a question."""
    in_flight: int
    busy: int
    """Answers of status 429 in this run."""
    bound: str
    """The bound that was reached; empty while none is."""


class MeterClient(Protocol):
    """What a worker sees of the meter."""

    async def admit(self) -> int:
        """Wait until a request may be sent; a number to settle it by. Raises ``BoundReachedError``."""

    async def settle(self, request: int, spent: Spent, *, answered: bool) -> None:
        """The outcome of an admitted request: what it cost, and whether the endpoint gave an answer."""

    async def pause(self, seconds: float) -> None:
        """Let no request go for so long; the endpoint is busy."""

    async def silent_s(self) -> float:
        """Seconds since anyone got an answer, or since the start of the run."""

    async def row_done(self, reason: str | None) -> str:
        """A row has its question, or stays without one for ``reason``; what is wrong, where too many of them do."""


class Meter:
    """See the module's docstring. ``clock`` gives seconds; ``spent`` is what earlier runs into this output cost."""

    def __init__(self, config: SynthesiseConfig, spent: Spent = Spent(), clock: Callable[[], float] = time.monotonic):
        self.config = config
        self.spent = spent
        self.rows = self.busy = 0
        self.reasons: Counter[str] = Counter()
        self.bound = ""
        self._clock = clock
        self._open_at = self._answered_at = clock()
        self._dearest = Spent(1, _FIRST_PROMPT_TOKENS, config.max_answer_tokens)
        if spent.tokens:  # what a request of earlier runs cost is a better guess
            self._dearest = Spent(1, *(-(-n // spent.requests) for n in (spent.prompt_tokens, spent.answer_tokens)))
        self._seen = False
        self._next = 0
        self._in_flight: dict[int, float] = {}  # when each was admitted
        self._door = asyncio.Lock()  # one waits behind it, the others in the order in which they came
        self._settled = asyncio.Event()

    async def admit(self) -> int:
        async with self._door:
            while True:
                if (wait_s := self._open_at - self._clock()) > 0:
                    await asyncio.sleep(wait_s)
                    continue
                passed = self._bound_of_one_more()
                if passed and not self._in_flight:
                    self.bound = passed
                    raise BoundReachedError(passed)
                if not passed and len(self._in_flight) < self.config.concurrency:
                    break
                await self._wait_for_one()
            self._next += 1
            self._in_flight[self._next] = self._clock()
            if rate := self.config.requests_per_minute:  # evenly spaced: bursts are what servers answer with 429
                self._open_at = max(self._open_at, self._clock()) + 60 / rate
            return self._next

    async def settle(self, request: int, spent: Spent, *, answered: bool) -> None:
        self._in_flight.pop(request, None)
        self._settled.set()
        self.spent += spent
        if answered:
            self._answered_at = self._clock()
        if spent.tokens and (not self._seen or spent.tokens > self._dearest.tokens):
            self._dearest, self._seen = replace(spent, requests=1), True

    async def pause(self, seconds: float) -> None:
        self.busy += 1
        self._open_at = max(self._open_at, self._clock() + min(seconds, _LONGEST_PAUSE_S))

    async def silent_s(self) -> float:
        return self._clock() - self._answered_at

    async def row_done(self, reason: str | None) -> str:
        self.rows += 1
        if reason is not None:
            self.reasons[reason] += 1
        failed = self.reasons.total()
        if self.rows < _ROWS_BEFORE_JUDGEMENT or failed <= self.config.max_failed_share * self.rows:
            return ""
        reasons = ", ".join(f"{name} {count}" for name, count in self.reasons.most_common())
        return f"{failed} of {self.rows} rows got no valid answer ({reasons})"

    async def reading(self) -> MeterReading:
        return MeterReading(self.spent, self.rows, self.reasons.total(), len(self._in_flight), self.busy, self.bound)

    def _bound_of_one_more(self) -> str:
        """The bound that one more request could pass; empty where there is none."""
        config, after = self.config, self.spent + self._dearest.times(len(self._in_flight) + 1)
        for name, value in (("requests", after.requests), ("tokens", after.tokens), ("cost", after.cost(config))):
            most = getattr(config, f"max_{name}")
            if most is not None and value > most:
                return f"synthesise.max_{name}={most}"
        return ""

    async def _wait_for_one(self) -> None:
        """Wait until a request is settled; forget those of workers that are gone."""
        self._settled.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), 1.0)
        oldest = self._clock() - self.config.timeout_s - _LOST_AFTER_S
        self._in_flight = {number: at for number, at in self._in_flight.items() if at > oldest}


class RemoteMeter:
    """The meter of a run, reached from a worker."""

    def __init__(self, actor: ray.actor.ActorHandle):
        self._actor = actor

    async def admit(self) -> int:
        admitted: int | str = await self._actor.admit_or_bound.remote()
        if isinstance(admitted, str):
            raise BoundReachedError(admitted)
        return admitted

    async def settle(self, request: int, spent: Spent, *, answered: bool) -> None:
        await self._actor.settle.remote(request, spent, answered=answered)

    async def pause(self, seconds: float) -> None:
        await self._actor.pause.remote(seconds)

    async def silent_s(self) -> float:
        return float(await self._actor.silent_s.remote())

    async def row_done(self, reason: str | None) -> str:
        return str(await self._actor.row_done.remote(reason))


class _MeterActor(Meter):
    async def admit_or_bound(self) -> int | str:
        """``admit``, or the bound that was reached: Ray prints what an actor raises."""
        try:
            return await self.admit()
        except BoundReachedError as error:
            return str(error)


def start_meter(config: SynthesiseConfig, spent: Spent) -> ray.actor.ActorHandle:
    """The actor of a run. It takes no CPU, and lets as many workers wait as there are."""
    return ray.remote(num_cpus=0, max_concurrency=10_000)(_MeterActor).remote(config, spent)
