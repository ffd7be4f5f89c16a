"""One row asked about, over real sockets, at a server that fails in every way that servers do."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest

from crem.errors import ConfigError, CremError, ResourceError
from pipelines.synthesis.asking import Asked, ask
from pipelines.synthesis.endpoint import KEY, Endpoint, host_of
from pipelines.synthesis.meter import BoundReachedError, Meter, Spent
from tests.pipelines.synthesis.answering_server import Reply, Request, answering, completion, good, refusal
from tests.pipelines.synthesis.conftest import settings

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Ask about it."}]}]
KINDS = ("describe", "count")


class Row:
    """One row asked about, with the pauses that it wanted instead of taken."""

    def __init__(self, base_url: str, *overrides: str, sleep: bool = False):
        self.config = settings(f"base_url={base_url}", "model=m", "timeout_s=2", *overrides)
        self.meter = Meter(self.config)
        self.pauses: list[float] = []
        self.sleep = sleep

    def ask(self, wanted: int = 1) -> Asked:
        return asyncio.run(self._ask(wanted))

    async def _ask(self, wanted: int) -> Asked:
        endpoint = Endpoint(self.config, KINDS)
        try:
            return await ask(
                MESSAGES,
                wanted,
                KINDS,
                endpoint=endpoint,
                meter=self.meter,
                config=self.config,
                sleep=self._pause,
                jitter=lambda: 0.0,
            )
        finally:
            await endpoint.close()

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(seconds if self.sleep else 0)


def first_then_good(*bad: Reply) -> Callable[[int, Request], Reply]:
    return lambda number, request: bad[number] if number < len(bad) else good(request)


def answer(text: str, **options: str) -> Reply:
    return Reply(body=completion(text, **options))


def test_a_valid_answer_is_taken_and_counted() -> None:
    with answering(lambda number, request: good(request, pairs=2)) as server:
        row = Row(server.base_url, "temperature=0.2", "request={seed: 5, top_p: 0.9}")
        asked = row.ask(wanted=2)
    assert [pair.answer for pair in asked.pairs] == ["thing 0", "thing 1"] and asked.reason is None
    assert asked.spent == row.meter.spent == Spent(1, 100, 20)
    body = server.requests[0].body
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"], body["top_p"]) == (
        "m",
        0.2,
        512,
        5,
        0.9,
    )
    assert body["response_format"]["json_schema"]["schema"]["properties"]["pairs"]["type"] == "array"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (answer("no JSON here"), "invalid_json"),
        (answer('{"pairs": [{"kind": "count"}]}'), "wrong_schema"),
        (answer('{"pairs": [{"kind": "count", "question": "How', finish="length"), "cut_off"),
        (answer('{"pairs": [{"kind": "count", "question": "q", "answer": ""}]}'), "bad_pair"),
    ],
)
def test_an_invalid_answer_is_asked_again_and_then_given_up(bad: Reply, reason: str) -> None:
    with answering(first_then_good(bad, bad)) as server:
        row = Row(server.base_url, "attempts=3")
        assert row.ask().reason is None and row.meter.spent.requests == 3
    with answering(first_then_good(bad, bad, bad)) as server:
        row = Row(server.base_url, "attempts=3")
        asked = row.ask()
    assert (asked.pairs, asked.reason, asked.spent.requests, row.pauses) == ((), reason, 3, [])
    assert asked.spent.prompt_tokens == 300, "an invalid answer costs as much as a valid one"


def test_a_refusal_of_the_model_is_not_asked_again() -> None:
    with answering(lambda number, request: answer("", finish="content_filter")) as server:
        assert Row(server.base_url).ask().reason == "refused" and len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "pause_s"),
    [
        (refusal(429, "slow down", Retry_After="7"), 7.0),
        (refusal(429, "slow down", Retry_After="0.25"), 0.25),
        (refusal(429, "slow down", retry_after_ms="1500"), 1.5),
        (refusal(429, "slow down"), 1.0),
        (refusal(429, "slow down", Retry_After="soon"), 1.0),
        (refusal(503, "starting", Retry_After="3"), 3.0),
        (refusal(500, "oh"), 1.0),
        (Reply(502, b"<html>Bad Gateway</html>", {"content-type": "text/html"}), 1.0),
        (Reply(200, b"<html>Login</html>", {"content-type": "text/html"}), 1.0),
        (Reply(200, b""), 1.0),
        (Reply(200, b'{"choices": []}'), 1.0),
        (Reply(200, b'{"choices": [{"mess'), 1.0),
        (Reply(200, completion("{}"), cut_at=20), 1.0),
    ],
)
def test_a_busy_or_faulty_server_is_asked_again_after_a_pause(reply: Reply, pause_s: float) -> None:
    with answering(first_then_good(reply)) as server:
        row = Row(server.base_url)
        row.meter.pause = _no_pause  # type: ignore[method-assign]
        asked = row.ask()
    assert asked.reason is None and row.pauses == [pause_s] and asked.spent == Spent(2, 100, 20)


async def _no_pause(seconds: float) -> None:
    """The pause of all workers is measured in ``test_meter``."""


def test_retry_after_may_be_a_date() -> None:
    def behave(number: int, request: Request) -> Reply:
        return good(request) if number else refusal(429, "later", Retry_After=formatdate(time.time() + 3, usegmt=True))

    with answering(behave) as server:
        row = Row(server.base_url)
        row.meter.pause = _no_pause  # type: ignore[method-assign]
        assert row.ask().reason is None and 1.5 < row.pauses[0] <= 3.0


def test_all_requests_wait_when_the_server_is_busy() -> None:
    with answering(first_then_good(refusal(429, "slow down", Retry_After="0.6"))) as server:
        row = Row(server.base_url, "concurrency=4")

        async def run() -> None:
            first = asyncio.create_task(row._ask(1))
            await asyncio.sleep(0.3)
            await asyncio.gather(first, *(row._ask(1) for _ in range(3)))

        asyncio.run(run())
    began = server.requests[0].at
    assert len(server.requests) == 5 and all(r.at - began > 0.55 for r in server.requests[1:])


def test_pauses_grow_and_have_a_limit() -> None:
    with answering(first_then_good(*[refusal(500, "oh")] * 7)) as server:
        row = Row(server.base_url)
        assert row.ask().reason is None
    assert row.pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


def test_a_server_that_hangs_is_asked_again() -> None:
    def behave(number: int, request: Request) -> Reply:
        return Reply(delay_s=1.5) if number == 0 else good(request)

    with answering(behave) as server:
        row = Row(server.base_url, "timeout_s=0.5")
        assert row.ask().reason is None and row.pauses == [1.0]


def test_a_request_that_brings_the_server_down_is_given_up() -> None:
    """The endpoint answers a smaller request, so this one is at fault."""

    def behave(number: int, request: Request) -> Reply:
        return refusal(500, "CUDA error") if "Ask about it" in request.text else answer("yes")

    with answering(behave) as server:
        row = Row(server.base_url)
        asked = row.ask()
    assert (asked.reason, len(server.requests)) == ("server_error", 9) and "CUDA error" in str(asked.detail)


def test_an_endpoint_that_stays_away_ends_the_job() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        row = Row(f"http://127.0.0.1:{port}/v1", "away_s=0.2")
        row.sleep = True
        with pytest.raises(ResourceError, match=rf"127\.0\.0\.1:{port}.*run the same command again"):
            row.ask()


def test_an_endpoint_that_comes_back_goes_on() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    row = Row(f"http://127.0.0.1:{port}/v1", sleep=True)
    found: list[Asked] = []
    asking = threading.Thread(target=lambda: found.append(row.ask()))
    asking.start()
    time.sleep(0.5)
    with answering(lambda number, request: good(request), port):
        asking.join(timeout=20)
    assert found and found[0].reason is None and row.pauses[0] == 1.0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(401, "Incorrect API key provided: sk-secret-1."), f"<key>.*{KEY} was refused"),
        (refusal(403, "no"), f"{KEY} was refused"),
        (refusal(404, "The model `m` does not exist."), "does it serve 'm'"),
        (refusal(402, "pay"), "no money left"),
        (refusal(429, "You exceeded your current quota insufficient_quota"), "no money left"),
    ],
)
def test_what_no_request_can_mend_ends_the_job_at_once(
    reply: Reply, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "sk-secret-1")
    with answering(lambda number, request: reply) as server, pytest.raises(ConfigError, match=message) as caught:
        Row(server.base_url).ask()
    assert len(server.requests) == 1 and "sk-secret" not in str(caught.value)
    assert server.requests[0].headers["authorization"] == "Bearer sk-secret-1"


def test_the_key_is_in_no_error_and_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-secret-1")
    assert host_of("https://me:sk-secret-1@example.org:8443/v1") == "example.org:8443"
    with answering(lambda number, request: refusal(400, "bad key sk-secret-1 " + "x" * 9_000)) as server:
        asked = Row(server.base_url).ask()
    assert asked.reason == "request_refused" and "sk-secret" not in str(asked.detail) and len(str(asked.detail)) < 400


def test_a_request_that_is_refused_is_the_row_s_fault() -> None:
    with answering(lambda number, request: refusal(400, "the image is too large")) as server:
        asked = Row(server.base_url).ask()
    assert (asked.reason, asked.spent.requests, len(server.requests)) == ("request_refused", 1, 1)
    assert "the image is too large" in str(asked.detail)


def strict(accepts: Callable[[dict[str, object]], str | None]) -> Callable[[int, Request], Reply]:
    def behave(number: int, request: Request) -> Reply:
        complaint = accepts(request.body)
        return good(request) if complaint is None else refusal(400, complaint)

    return behave


def no_schema(body: dict[str, object]) -> str | None:
    form = body.get("response_format")
    return "response_format.type 'json_schema' is unavailable" if "json_schema" in json.dumps(form) else None


def no_format(body: dict[str, object]) -> str | None:
    return "unknown field 'response_format'" if "response_format" in body else None


def reasoning(body: dict[str, object]) -> str | None:
    if "max_tokens" in body:
        return "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    return "Unsupported value: 'temperature' supports only 1" if "temperature" in body else None


@pytest.mark.parametrize(("accepts", "refused"), [(no_schema, 1), (no_format, 2), (reasoning, 2)])
def test_the_form_of_requests_follows_what_the_endpoint_accepts(
    accepts: Callable[[dict[str, object]], str | None], refused: int
) -> None:
    with answering(strict(accepts)) as server:
        row = Row(server.base_url)

        async def run() -> list[Asked]:
            endpoint = Endpoint(row.config, KINDS)
            asked = [
                await ask(MESSAGES, 1, KINDS, endpoint=endpoint, meter=row.meter, config=row.config) for _ in range(3)
            ]
            await endpoint.close()
            return asked

        assert [asked.reason for asked in asyncio.run(run())] == [None] * 3
    assert len(server.requests) == 3 + refused, "the form is remembered"


def test_a_form_that_was_chosen_is_kept() -> None:
    with answering(strict(no_schema)) as server:
        assert Row(server.base_url, "structured=json_schema").ask().reason == "request_refused"
        assert Row(server.base_url, "structured=json_object").ask().reason is None
        assert Row(server.base_url, "structured=text").ask().reason is None
    assert [r.body.get("response_format", {}).get("type") for r in server.requests] == [
        "json_schema",
        "json_object",
        None,
    ]


def test_an_endpoint_that_counts_no_tokens_is_estimated() -> None:
    with answering(lambda number, request: Reply(body=completion(good(request).body.decode(), usage=None))) as server:
        row = Row(server.base_url, "attempts=1")
        row.ask()
    assert row.meter.spent.prompt_tokens > 5 and row.meter.spent.answer_tokens > 50


def test_a_bound_ends_the_asking() -> None:
    with answering(lambda number, request: answer("no JSON")) as server:
        row = Row(server.base_url, "max_requests=2", "attempts=5")
        with pytest.raises(BoundReachedError):
            row.ask()
    assert len(server.requests) == 2


def test_no_address_is_refused() -> None:
    with pytest.raises(CremError, match="synthesise.base_url is not set"):
        Endpoint(settings("model=m"), KINDS)
