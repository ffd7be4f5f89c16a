"""What is taken, what is refused and by which name, and what a request means: without a server."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from crem.errors import ItemError
from serve.engine import Embedded, Ending
from serve.protocol import ApiError, ChatRequest, EmbeddingRequest, validation_error
from serve.translation import CompletionWriter, embedding_response, generation_request, items_of

PNG = b"\x89PNG not decoded here"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def refusal(kind: type[BaseModel], **body: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return validation_error(caught.value.errors())


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(url: str = DATA_URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def question(*messages: dict[str, Any], **fields: Any) -> Any:
    return generation_request(ChatRequest.model_validate({"messages": messages, **fields}), max_new_tokens=100)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]]])
def test_token_arrays_are_refused_with_the_remedy(tokens: list[Any]) -> None:
    error = refusal(EmbeddingRequest, input=tokens)
    assert (error.status, error.param, error.code) == (400, "input", "token_array")
    assert "send the text itself" in error.message


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (EmbeddingRequest, {"input": []}, "input"),
        (EmbeddingRequest, {"input": ["a", 1]}, "input[1]"),
        (EmbeddingRequest, {"input": ["a", "\ud800"]}, "input[1]"),
        (EmbeddingRequest, {}, "input"),
        (EmbeddingRequest, {"input": "a", "messages": [user("b")]}, "input"),
        (EmbeddingRequest, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [user("a")], "n": 2}, "n"),
        (ChatRequest, {"messages": [user("a")], "temperature": float("nan")}, "temperature"),
        (ChatRequest, {"messages": [user("a")], "top_p": 0}, "top_p"),
        (ChatRequest, {"messages": [user("a")], "max_tokens": 0}, "max_tokens"),
        (ChatRequest, {"messages": [user("a")], "stop": [""]}, "stop[0]"),
        (ChatRequest, {"messages": [user("a")], "mode": "fast"}, "mode"),
        (ChatRequest, {"messages": [user("a")], "tools": [{"type": "function"}]}, "tools"),
        (ChatRequest, {"messages": [user("a")], "logprobs": True}, "logprobs"),
        (ChatRequest, {"messages": [user("a")], "response_format": {"type": "json_object"}}, "response_format"),
        (ChatRequest, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        (ChatRequest, {"messages": [user(text("a"), {"type": "input_audio"})]}, "messages[0].content[1]"),
        (
            ChatRequest,
            {"messages": [user(text("a"), {"type": "image_url", "image_url": {}})]},
            "messages[0].content[1].image_url.url",
        ),
    ],
)
def test_a_refusal_names_the_field(kind: type[BaseModel], body: dict[str, Any], param: str) -> None:
    error = refusal(kind, **body)
    assert (error.status, error.param) == (400, param)
    assert param in error.message
    assert error.body["error"]["type"] == "invalid_request_error"


def test_unknown_fields_are_refused_with_the_nearest_name() -> None:
    error = refusal(ChatRequest, messages=[user("a")], mod="compressed")
    assert error.message == "unknown field 'mod'; did you mean 'mode'?"


def test_values_that_ask_for_nothing_and_bookkeeping_pass() -> None:
    ChatRequest.model_validate(
        {"messages": [user("a")], "tools": [], "logprobs": False, "n": 1, "presence_penalty": 0, "user": "me"}
    )


def test_messages_of_an_embedding_are_one_item() -> None:
    request = EmbeddingRequest.model_validate(
        {"messages": [user(text("a"), image()), user("b")], "instruction": "Find it."}
    )
    (item,) = items_of(request, max_inputs=1)
    assert (item.text, item.images, item.instruction, item.image_at) == ("a\nb", (PNG,), "Find it.", (1,))


def test_too_many_inputs() -> None:
    with pytest.raises(ApiError, match="3 items are over this server's limit of 2"):
        items_of(EmbeddingRequest(input=["a", "b", "c"]), max_inputs=2)


def test_the_last_text_is_the_instruction_and_the_rest_is_the_item() -> None:
    request = question({"role": "system", "content": "A shop."}, user("Red."), user(image(), text("What is it?")))
    assert request.prompt == "What is it?"
    assert (request.item.text, request.item.images, request.item.image_at) == ("A shop.\nRed.", (PNG,), (12,))


def test_texts_and_images_keep_their_order() -> None:
    parts = [image(), text("before"), image(), text("after"), image()]
    (item,) = items_of(EmbeddingRequest.model_validate({"messages": [user(*parts), user("b"), user(image())]}), 1)
    assert (item.text, len(item.images), item.image_at) == ("before\nafter\nb", 4, (0, 6, 12, 14))
    first = user(image(), text("What?"))
    request = question(first, {"role": "assistant", "content": "A cat."}, user(image(), text("And this?")))
    assert (request.item.text, request.item.image_at) == ("user: What?\nassistant: A cat.", (0, 29))
    assert request.prompt == "And this?"


def test_a_image_alone_is_the_item() -> None:
    request = question(user(image(), text("What is it?")))
    assert (request.item.text, request.item.images, request.prompt) == (None, (PNG,), "What is it?")


def test_a_lone_text_is_item_and_instruction() -> None:
    request = question(user("What is red?"))
    assert request.item.text == request.prompt == "What is red?"


def test_a_dialogue_keeps_its_roles_and_all_images() -> None:
    request = question(user(image(), text("What?")), {"role": "assistant", "content": "A cat."}, user("Its colour?"))
    assert request.item.text == "user: What?\nassistant: A cat."
    assert request.item.images == (PNG,)


def test_sampling_fields_reach_the_model() -> None:
    request = question(
        user("a"), mode="compressed", max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop="END", stream=True
    )
    assert request.compressed
    assert (request.max_new_tokens, request.temperature, request.top_p, request.seed) == (7, 0.5, 0.9, 3)
    assert request.stop == ("END",)
    plain = question(user("a"))
    assert (plain.compressed, plain.max_new_tokens, plain.temperature, plain.stop) == (False, 100, 0.0, ())


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_limit_are_refused(field: str) -> None:
    with pytest.raises(ApiError, match="101 is over this server's limit of 100") as caught:
        question(user("a"), **{field: 101})
    assert caught.value.param == field


@pytest.mark.parametrize("url", ["http://host/a.png", "https://host/a.png", "file:///etc/passwd", "s3://b/a", "/a.png"])
def test_nothing_is_fetched(url: str) -> None:
    with pytest.raises(ApiError, match="only data: URLs") as caught:
        question(user(text("a"), image(url)))
    assert caught.value.code == "uri_refused"
    assert caught.value.param == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize("url", ["data:image/png;base64,%%%", "data:image/png,abc", "data:image/png;base64"])
def test_broken_data_urls(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        question(user(text("a"), image(url)))
    assert caught.value.code == "image_corrupt"


@pytest.mark.parametrize("messages", [[user("a"), {"role": "assistant", "content": "b"}], [user(image())], [user(" ")]])
def test_a_chat_ends_with_a_question(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ApiError) as caught:
        question(*messages)
    assert caught.value.param == "messages"


def test_base64_is_little_endian_float32() -> None:
    vector = np.array([0.6, -0.8], dtype=np.float32)
    results = [Embedded(vector, 3), Embedded(-vector, 4)]
    request = EmbeddingRequest(input=["a", "b"], encoding_format="base64")
    response = embedding_response("m", request, results)
    decoded = np.frombuffer(base64.b64decode(response["data"][1]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(decoded, -vector)
    assert [d["index"] for d in response["data"]] == [0, 1]
    assert response["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_a_bad_item_is_named_by_its_place() -> None:
    results = [Embedded(np.zeros(2, np.float32), 1), ItemError("empty_item", "give a text")]
    with pytest.raises(ApiError) as caught:
        embedding_response("m", EmbeddingRequest(input=["a", "b"]), results)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "input[1]", "empty_item")


def test_chunks_share_one_id_and_usage_comes_without_choices() -> None:
    writer = CompletionWriter("m")
    ending = Ending("length", prompt_tokens=5, completion_tokens=2)
    role, piece, finish, usage = writer.role(), writer.text("x"), writer.finish("length"), writer.usage(ending)
    assert {c["id"] for c in (role, piece, finish, usage)} == {writer.id}
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert piece["choices"][0] == {"index": 0, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
