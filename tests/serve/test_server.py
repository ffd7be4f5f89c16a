"""The real application on Ray Serve over a tiny real checkpoint, called with the real ``openai`` client."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import crem
from crem.config import load_config

pytestmark = pytest.mark.ray

OVERRIDES = ["serve.port=0", "serve.max_replicas=1", "serve.max_new_tokens=1500", "serve.max_request_bytes=200000"]


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_model_dir: str) -> str:
    from serve import app

    return app.run(tiny_model_dir, load_config("micro", OVERRIDES))


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(tiny_model_dir: str) -> crem.Crem:
    return crem.load(tiny_model_dir)


@pytest.fixture(scope="module")
def replica(url: str) -> Any:
    from ray import serve

    return serve.get_deployment_handle("ModelReplica", app_name="crem")


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "PNG")
    return out.getvalue()


def image(colour: str) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(colour)).decode()},
    }


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user_message(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


GREEN = user_message(image("green"), text("name the colour"))
LIVELY: dict[str, Any] = {"temperature": 1.0, "seed": 3}
"""A random model's greedy answer soon repeats itself; a seeded sample does not, broken characters included."""


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_embeddings_are_the_librarys(client: openai.OpenAI, model: crem.Crem, options: dict[str, Any]) -> None:
    texts = ["a red apple", "animals and nature"]
    response = client.embeddings.create(model="model", input=texts, dimensions=model.dim, **options)
    vectors = [
        np.frombuffer(base64.b64decode(d.embedding), "<f4") if isinstance(d.embedding, str) else d.embedding
        for d in response.data
    ]
    np.testing.assert_allclose(np.array(vectors), model.embed(texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert response.usage.prompt_tokens == sum(model.prepare(t).tokens for t in texts)


def test_an_image_with_text_is_one_item(client: openai.OpenAI, model: crem.Crem) -> None:
    body = {"model": "model", "messages": user_message(image("red"), text("an apple")), "instruction": "Find it."}
    response = client.post("/embeddings", body=body, cast_to=httpx.Response).json()
    expected = model.embed([crem.Item(text="an apple", images=[png("red")], instruction="Find it.")])
    np.testing.assert_allclose([d["embedding"] for d in response["data"]], expected, atol=1e-5)


def test_twenty_at_once_share_forwards_and_one_bad_item_fails_alone(
    client: openai.OpenAI, model: crem.Crem, replica: Any
) -> None:
    texts = [f"a red apple number {i}" for i in range(20)]
    texts[7] = ""
    barrier = threading.Barrier(len(texts))

    def embed(value: str) -> list[float] | openai.APIStatusError:
        barrier.wait()
        try:
            return client.embeddings.create(model="model", input=value).data[0].embedding
        except openai.APIStatusError as error:
            return error

    before = replica.activity.remote().result().batches
    with ThreadPoolExecutor(len(texts)) as pool:
        results = list(pool.map(embed, texts))
    error = results.pop(7)
    assert isinstance(error, openai.BadRequestError)
    assert (error.code, error.param) == ("empty_item", "input[0]")
    np.testing.assert_allclose(np.array(results), model.embed([t for t in texts if t]), atol=1e-5)
    assert replica.activity.remote().result().batches - before < len(texts)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["native", "compressed"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}, LIVELY])
def test_answers_are_the_librarys(client: openai.OpenAI, model: crem.Crem, mode: str, sampling: dict[str, Any]) -> None:
    (answer,) = model.answer(
        [crem.Item(images=[png("green")])],
        "name the colour",
        compressed=mode == "compressed",
        max_new_tokens=12,
        **sampling,
    )
    assert answer.text
    response = client.chat.completions.create(
        model="model", messages=GREEN, max_tokens=12, extra_body={"mode": mode}, **sampling
    )
    assert response.choices[0].message.content == answer.text
    assert response.choices[0].finish_reason == answer.finish_reason
    assert response.usage is not None
    assert response.usage.prompt_tokens == answer.prompt_tokens
    assert response.usage.completion_tokens == answer.completion_tokens


def test_native_is_the_default_and_differs_from_compressed(client: openai.OpenAI) -> None:
    def answer(**options: Any) -> str | None:
        response = client.chat.completions.create(model="model", messages=GREEN, max_tokens=12, **options)
        return response.choices[0].message.content

    assert answer() == answer(extra_body={"mode": "native"})
    assert answer() != answer(extra_body={"mode": "compressed"})


@pytest.mark.parametrize("stop", [None, "half"])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, stop: str | None) -> None:
    options: dict[str, Any] = {"model": "model", "messages": GREEN, "max_tokens": 40, **LIVELY}
    whole = client.chat.completions.create(**options)
    content = whole.choices[0].message.content or ""
    if stop is not None:
        options["stop"] = [content[len(content) // 2 :][:2]]
        whole = client.chat.completions.create(**options)
        assert whole.choices[0].finish_reason == "stop"
        assert content.startswith(whole.choices[0].message.content or "")
        assert options["stop"][0] not in (whole.choices[0].message.content or "")
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(streamed) == whole.choices[0].message.content
    assert sum(map(bool, streamed)) > 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_stream_ends_with_done(url: str) -> None:
    body = {"messages": GREEN, "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_stops_decoding_and_embeddings_do_not_wait_for_it(
    client: openai.OpenAI, url: str, replica: Any, stream: bool
) -> None:
    def activity() -> Any:
        return replica.activity.remote().result()

    before = activity().deltas
    body = {"messages": GREEN, "max_tokens": 1500, "stream": stream, **LIVELY}
    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(_hang_up_after, 0.5, url, body)
        wait_for(lambda: activity().deltas > before)
        client.embeddings.create(model="model", input="meanwhile")
        assert activity().answering == 1, "the embedding came while the answer was being decoded"
        caller.result()
    wait_for(lambda: activity().answering == 0)
    stopped_at = activity().deltas
    time.sleep(0.5)
    assert activity().deltas == stopped_at
    assert 0 < stopped_at - before < 750, "decoding continued after the client disconnected"


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def _hang_up_after(seconds: float, url: str, body: dict[str, Any]) -> None:
    start = time.monotonic()
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=seconds) as response:
            for _ in response.iter_lines():
                if time.monotonic() - start > seconds:
                    return
    except httpx.ReadTimeout:
        assert not body["stream"]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_have_the_clients_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="other", input="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="cannot be cut to 3"):
        client.embeddings.create(model="model", input="a", dimensions=3)
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="model", messages=GREEN, logprobs=True)
    assert tools.value.param == "logprobs"


@pytest.mark.parametrize("stream", [True, False])
def test_a_corrupt_image_is_a_400_in_a_stream_too(client: openai.OpenAI, stream: bool) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="model", messages=user_message(broken, text("what?")), stream=stream)
    assert caught.value.code == "image_corrupt"


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/embeddings", b'{"input": ', 400, "invalid_json"),
        ("POST", "/v1/embeddings", b"[1]", 400, "invalid_body"),
        ("POST", "/v1/embeddings", b"", 400, "invalid_body"),
        ("POST", "/v1/embeddings", b"[" * 100_000, 400, None),
        ("POST", "/v1/embeddings", b'{"input": "\xff"}', 400, None),
        ("POST", "/v1/chat/completions", b"x" * 300_000, 413, "request_too_large"),
        ("POST", "/v1/chat/completions", b"x" * 20_000_000, 413, "request_too_large"),
        ("GET", "/v1/embeddings", b"", 405, None),
        ("GET", "/v2/embeddings", b"", 404, None),
    ],
)
def test_one_envelope_for_everything(
    url: str, method: str, path: str, content: bytes, status: int, code: str | None
) -> None:
    response = httpx.request(method, url + path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code


def test_a_body_without_a_length_is_bounded_as_it_arrives(url: str) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 1000

    response = httpx.post(f"{url}/v1/embeddings", content=body(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


# --- the server -----------------------------------------------------------------------------------------------------


def test_health_and_models_name_the_checkpoint(url: str, client: openai.OpenAI, model: crem.Crem) -> None:
    response = httpx.get(f"{url}/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": "model", "fingerprint": model.fingerprint}
    assert [m.id for m in client.models.list()] == ["model"]
    assert client.models.retrieve("model").id == "model"


def test_overload_is_a_429_with_retry_after(url: str, tiny_model_dir: str) -> None:
    from ray import serve

    from serve import app

    small = [*OVERRIDES, "serve.max_ongoing_requests=1", "serve.max_queued_requests=1", "serve.cpus_per_replica=0.5"]
    serve.run(app.build(tiny_model_dir, load_config("micro", small)), name="small", route_prefix="/small")
    client = openai.OpenAI(base_url=f"{url}/small/v1", api_key="none", max_retries=0)

    def ask(_: int) -> openai.RateLimitError | None:
        try:
            client.chat.completions.create(model="model", messages=GREEN, max_tokens=100)
        except openai.RateLimitError as error:
            return error
        return None

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(ask, range(8)))
    serve.delete("small")
    assert None in errors, "what the server takes is answered"
    refused = [error for error in errors if error is not None]
    assert {error.code for error in refused} == {"overloaded"}
    assert {error.response.headers["retry-after"] for error in refused} == {"1"}


@pytest.mark.slow
def test_a_model_that_does_not_load_is_not_ready(url: str, tmp_path: Path) -> None:
    from ray import serve

    from serve import app

    broken = app.build(str(tmp_path), load_config("micro", OVERRIDES))
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(serve.run, broken, name="broken", route_prefix="/broken")
        wait_for(lambda: "broken" in serve.status().applications)
        health = httpx.get(f"{url}/broken/health", timeout=60)  # waits for the ingress, not for the model
        response = httpx.post(f"{url}/broken/v1/embeddings", json={"input": "a"}, timeout=5)
        assert failing.exception(timeout=120) is not None
    serve.delete("broken")
    assert (health.status_code, response.status_code) == (503, 503)
    assert response.json()["error"]["code"] == "not_ready"
