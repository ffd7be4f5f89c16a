"""What clients see when the model's side of the boundary fails; a hand-written handle does the failing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from crem.config import ServeConfig
from serve.deployments import ModelCard, ModelClient
from serve.engine import Delta, Ending
from serve.routes import create_app

CHAT = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "stream_options": {"include_usage": True}}


class Call:
    """One method of a handle: an awaitable or an asynchronous iterator, as Serve's responses are."""

    def __init__(self, steps: list[Any]):
        self._steps, self.cancelled = iter(steps), False

    def remote(self, *_: Any) -> Call:
        return self

    def __await__(self) -> Any:
        return self.__anext__().__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        step = next(self._steps, StopAsyncIteration())
        if isinstance(step, BaseException):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle whose calls answer with the given steps."""

    def __init__(self, **calls: list[Any]):
        self.card = Call([ModelCard("m", "f", 2)])
        for name, steps in calls.items():
            setattr(self, name, Call(steps))

    def options(self, **_: Any) -> Handle:
        return self


class ReadyClient(ModelClient):
    """There is no controller to ask."""

    async def ready(self) -> bool:
        return True


@pytest.fixture
def serving() -> Callable[..., TestClient]:
    def start(**calls: list[Any]) -> TestClient:
        app = create_app(ReadyClient(Handle(**calls)), ServeConfig())  # type: ignore[arg-type]
        return TestClient(app, raise_server_exceptions=False)

    return start


def test_internals_stay_inside(serving: Callable[..., TestClient]) -> None:
    response = serving(embed=[RuntimeError("/secret/path")]).post("/v1/embeddings", json={"input": "a"})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error; the server's log has the details",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(BackPressureError(9, 8, 429, 1), 429, "overloaded"), (ActorDiedError(), 503, "model_unavailable")],
)
@pytest.mark.parametrize(
    ("path", "call", "body"), [("embeddings", "embed", {"input": "a"}), ("chat/completions", "stream", CHAT)]
)
def test_overload_and_a_lost_replica_ask_to_come_again(
    serving: Callable[..., TestClient],
    failure: Exception,
    status: int,
    code: str,
    path: str,
    call: str,
    body: dict[str, Any],
) -> None:
    response = serving(**{call: [failure]}).post(f"/v1/{path}", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["retry-after"] == "1"


def test_a_stream_that_breaks_off_says_so(serving: Callable[..., TestClient]) -> None:
    steps = [Delta("some"), RuntimeError("/secret/path")]
    response = serving(stream=steps).post("/v1/chat/completions", json=CHAT)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert response.status_code == 200
    assert json.loads(events[1])["choices"][0]["delta"] == {"content": "some"}
    assert json.loads(events[2])["error"]["code"] == "internal_error"
    assert events[3:] == ["[DONE]"]
    assert "secret" not in response.text


def test_a_stream_of_one_piece_is_complete(serving: Callable[..., TestClient]) -> None:
    response = serving(stream=[Delta("all", Ending("stop", 3, 1))]).post("/v1/chat/completions", json=CHAT)
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line[6:7] == "{"]
    assert [e["choices"][0]["delta"] for e in events[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "all"},
        {},
    ]
    assert events[-1]["usage"]["total_tokens"] == 4
