"""Bounds on requests, tokens, money, rate and concurrency: never passed, and reached."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from crem.config import SynthesiseConfig
from crem.errors import ConfigError
from pipelines.synthesis.asking_progress import progress_line
from pipelines.synthesis.meter import BoundReachedError, Meter, MeterReading, Spent
from tests.pipelines.synthesis.conftest import settings


async def spend(meter: Meter, workers: int, cost: Spent, each_s: float = 0.0) -> tuple[int, int]:
    """Requests by many workers until a bound: (sent, most in flight)."""
    sent = in_flight = most = 0

    async def work() -> None:
        nonlocal sent, in_flight, most
        while True:
            try:
                request = await meter.admit()
            except BoundReachedError:
                return
            sent, in_flight = sent + 1, in_flight + 1
            most = max(most, in_flight)
            await asyncio.sleep(each_s)
            in_flight -= 1
            await meter.settle(request, cost, answered=True)

    await asyncio.wait_for(asyncio.gather(*(work() for _ in range(workers))), 20)
    return sent, most


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("max_requests=37", 37),
        ("max_tokens=1230", 10),  # 123 tokens a request: ten fit exactly
        ("max_tokens=1229", 9),
        ("max_cost=0.0147", 10),  # 0.00146 a request
        ("max_cost=0.0145", 9),
    ],
)
def test_bounds_are_reached_and_never_passed(bound: str, expected: int) -> None:
    config = settings(bound, "input_price=10", "output_price=20", "max_answer_tokens=1", "concurrency=8")
    meter = Meter(config, Spent())
    meter._dearest = Spent(1, 100, 23)  # as if one had come back: the reserve before that is larger than these bounds
    sent, most = asyncio.run(spend(meter, 20, Spent(1, 100, 23), 0.001))
    assert sent == expected and meter.spent.requests == expected and most <= 8
    assert meter.bound == f"synthesise.{bound}"


def test_what_earlier_runs_spent_counts() -> None:
    meter = Meter(settings("max_requests=5"), Spent(3, 10, 10))
    assert asyncio.run(spend(meter, 4, Spent(1, 1, 1)))[0] == 2
    meter = Meter(settings("max_requests=5"), Spent(5))
    with pytest.raises(BoundReachedError, match=r"synthesise\.max_requests=5"):
        asyncio.run(meter.admit())


def test_a_dear_request_raises_the_reserve() -> None:
    """Reserves of the requests in flight are as high as the dearest one was."""
    meter = Meter(settings("max_tokens=10000", "concurrency=50", "max_answer_tokens=10"))

    async def run() -> None:
        first = await meter.admit()
        await meter.settle(first, Spent(1, 3_900, 100), answered=True)
        await meter.admit()  # 4,000 + 4,000 fit, and no further one
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(meter.admit(), 0.3)

    asyncio.run(run())


def test_concurrency_and_lost_requests() -> None:
    clock = [0.0]
    meter = Meter(settings("concurrency=3", "timeout_s=100"), clock=lambda: clock[0])

    async def run() -> None:
        for _ in range(3):
            await meter.admit()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(meter.admit(), 0.2)
        clock[0] = 161.0  # their worker died: they are past the timeout and the grace
        await asyncio.wait_for(meter.admit(), 3)

    asyncio.run(run())


def test_the_rate_is_spread_evenly_and_pauses_hold_all_back() -> None:
    times: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        meter = Meter(settings("requests_per_minute=600", "concurrency=99"), clock=loop.time)

        async def one() -> None:
            await meter.settle(await meter.admit(), Spent(1), answered=True)
            times.append(loop.time())

        await asyncio.gather(*(one() for _ in range(6)))
        await meter.pause(0.5)
        await one()

    asyncio.run(run())
    gaps = [b - a for a, b in pairwise(times)]
    assert all(0.09 < gap < 0.2 for gap in gaps[:5]) and 0.45 < gaps[5] < 0.7


def test_a_run_in_which_most_rows_fail_is_hopeless() -> None:
    meter = Meter(settings("max_failed_share=0.5"))

    async def run(outcomes: list[str | None]) -> list[str]:
        return [await meter.row_done(outcome) for outcome in outcomes]

    assert set(asyncio.run(run(["invalid_json"] * 30 + [None] * 19))) == {""}
    assert asyncio.run(run([None] * 11)) == [
        "30 of 50 rows got no valid answer (invalid_json 30)",
        *(f"30 of {n} rows got no valid answer (invalid_json 30)" for n in range(51, 60)),
        "",
    ]


def test_a_bound_on_the_cost_needs_prices() -> None:
    with pytest.raises(ConfigError, match="synthesise.input_price"):
        settings("max_cost=1")
    assert Spent(1, 2_000_000, 500_000).cost(SynthesiseConfig(input_price=0.5, output_price=2)) == 2.0


def test_the_log_tells_speed_cost_and_time_left() -> None:
    reading = MeterReading(Spent(30, 900_000, 100_000), rows=20, failed=2, in_flight=4, busy=3, bound="")
    line = progress_line(reading, 100, 40.0, settings("input_price=1", "output_price=6"))
    assert line == (
        "20 of at most 100 rows asked about, 2 without a valid answer, 0.5 rows/s, 1000000 tokens, cost 1.50, "
        "4 in flight, 3 times busy, 3 min left at most"
    )
    assert "no answer yet" in progress_line(MeterReading(Spent(), 0, 0, 0, 0, ""), 9, 1.0, settings())
