"""OpenAI's requests as CREM's items and questions, and its results as OpenAI's responses. Pure: no Ray, no HTTP server.

Choices:

- ``messages`` in an embeddings request is **one** item: the texts and images of all turns, in their order.
- In a chat, the text of the last user message is the generation instruction Q; its images and everything before it
  are the item (V, T). A single text message is both: an item needs content, and the question has to follow the chorus
  tokens, where the model was trained to read it. Earlier texts are joined unchanged; if one is the assistant's, each is
  prefixed with its role.
- Images are accepted as ``data:`` URLs only and decoded to bytes here, so a client cannot name a file or a host.
- ``temperature`` is 0 by default, as in ``crem.Crem``: the same request gets the same answer.
"""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

import crem
from crem.errors import ItemError
from serve.engine import Embedded, Ending, GenerationRequest
from serve.protocol import ApiError, ChatRequest, EmbeddingRequest, ImagePart, Json, Message

__all__ = ["CompletionWriter", "embedding_response", "generation_request", "items_of"]


def items_of(request: EmbeddingRequest, max_inputs: int) -> list[crem.Item]:
    """The items to embed, in order. Raises ``ApiError`` 400."""
    if request.messages is not None:
        return [_item(request.messages, len(request.messages), request.instruction, roles=False)]
    assert request.input is not None
    if len(request.input) > max_inputs:
        raise ApiError(
            400,
            f"input: {len(request.input)} items are over this server's limit of {max_inputs} per request; send several",
            param="input",
            code="too_many_inputs",
        )
    return [crem.Item(text=text, instruction=request.instruction) for text in request.input]


def generation_request(request: ChatRequest, max_new_tokens: int) -> GenerationRequest:
    """The question and its item (see the module's docstring). Raises ``ApiError`` 400."""
    *earlier, last = request.messages
    if last.role != "user":
        raise ApiError(400, "the last message must be the user's", param="messages", code="last_message_not_user")
    if not last.text.strip():
        raise ApiError(
            400, "the last user message needs a text: the question", param="messages", code="empty_instruction"
        )
    roles = any(message.role == "assistant" for message in earlier)
    item = _item(request.messages, len(earlier), request.instruction, roles=roles)
    if not item.text and not item.images:
        item = replace(item, text=last.text)
    limit = request.max_completion_tokens or request.max_tokens or max_new_tokens
    if limit > max_new_tokens:
        raise ApiError(
            400,
            f"max_tokens: {limit} is over this server's limit of {max_new_tokens}; ask for less",
            param="max_tokens" if request.max_completion_tokens is None else "max_completion_tokens",
            code="max_tokens_too_large",
        )
    return GenerationRequest(
        item=item,
        prompt=last.text,
        compressed=request.mode == "compressed",
        max_new_tokens=limit,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(request.stop or ()),
    )


def _item(messages: Sequence[Message], texts: int, instruction: str | None, *, roles: bool) -> crem.Item:
    """All images, and the texts of the first ``texts`` messages, in their order; each message on a line of its own.

    Args:
        roles: whether to begin each message's text with its role.
    """
    text = ""
    images: list[bytes] = []
    places: list[int] = []
    for i, message in enumerate(messages):
        has_text = i < texts and bool(message.text)
        lead = ("\n" if text else "") + (f"{message.role}: " if roles else "")
        for j, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                images.append(_decode(part.image_url.url, f"messages[{i}].content[{j}].image_url.url"))
                places.append(len(text))
            elif has_text:
                text += lead + part.text
                lead = "\n"
    return crem.Item(text or None, tuple(images), instruction, tuple(places))


def _decode(url: str, param: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not header.startswith("data:"):
        raise ApiError(
            400,
            f"{param}: only data: URLs are accepted, this server fetches nothing; send 'data:image/png;base64,…'",
            param=param,
            code="uri_refused",
        )
    if not comma or not header.endswith(";base64"):
        raise ApiError(
            400, f"{param}: a data: URL must be 'data:image/<type>;base64,<payload>'", param=param, code="image_corrupt"
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param}: the payload is not valid base64", param=param, code="image_corrupt") from error


def embedding_response(model: str, request: EmbeddingRequest, results: Sequence[Embedded | ItemError]) -> Json:
    """OpenAI's list of embeddings. Raises ``ApiError`` 400 for the first bad item, named by its index."""
    data, tokens = [], 0
    for index, result in enumerate(results):
        if isinstance(result, ItemError):
            raise ApiError.of_item(result, "messages" if request.messages is not None else f"input[{index}]")
        vector = np.ascontiguousarray(result.vector, dtype="<f4")
        as_base64 = request.encoding_format == "base64"
        encoded = base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": encoded})
        tokens += result.tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


@dataclass(frozen=True)
class CompletionWriter:
    """Writes one answer, complete or in chunks, under one id."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def complete(self, text: str, ending: Ending) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ending.finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": _usage(ending)}

    def role(self) -> Json:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> Json:
        return self._chunk({"content": text})

    def finish(self, reason: str) -> Json:
        return self._chunk({}, reason)

    def usage(self, ending: Ending) -> Json:
        """The chunk without choices that ``stream_options.include_usage`` asks for."""
        return self._object("chat.completion.chunk", []) | {"usage": _usage(ending)}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _usage(ending: Ending) -> dict[str, int]:
    return {
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        "total_tokens": ending.prompt_tokens + ending.completion_tokens,
    }
