"""OpenAI's requests and error envelope, as this server accepts them. Pure: no Ray, no HTTP server.

Choices:

- A field that would change the answer and is not implemented is refused by name, unless its value has no effect
  (``n=1``, ``tools=[]``). Fields for the caller's bookkeeping alone (``user``) are ignored. Unknown fields are refused
  with the nearest known name: a misspelt ``mode`` must not fall back to native answers.
- Errors of any kind have OpenAI's envelope ``{"error": {"message", "type", "param", "code"}}``; messages never repeat
  the content of a request.

Sources: OpenAI's API reference (embeddings, chat completions); vLLM's OpenAI-compatible server for ``messages`` in an
embeddings request.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from crem.errors import ItemError

__all__ = ["ApiError", "ChatRequest", "EmbeddingRequest", "ImagePart", "Json", "Message", "validation_error"]

Json = dict[str, Any]
"""An object in OpenAI's JSON."""


class ApiError(Exception):
    """A response other than 200, in OpenAI's envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> Json:
        kind = {429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def of_item(cls, error: ItemError, param: str) -> ApiError:
        """400 for an item that cannot be used; its reason becomes the code."""
        return cls(400, f"{param}: {error.detail}", param=param, code=error.reason)


class _Request(BaseModel):
    """A body whose unknown fields are refused by name; see the module's choices."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)
    ignored: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not implemented, with the values that have no effect."""

    model: str | None = None
    """Name of the served model; optional, because there is only one."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name in cls.model_fields or name in cls.ignored or (name in cls.neutral and value in cls.neutral[name]):
                continue
            if name in cls.neutral:
                raise PydanticCustomError(
                    "unsupported_field", "'{param}' is not supported by this server; leave it out", {"param": name}
                )
            near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "; leave it out"
            raise PydanticCustomError(
                "unknown_field", "unknown field '{param}'{hint}", {"param": str(name)[:80], "hint": hint}
            )
        return body


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("not_unicode", "a text must be valid Unicode, without lone surrogates") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    url: str
    """``data:image/<type>;base64,<payload>``."""


class ImagePart(BaseModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [] if content is None else [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn; a plain string is one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] = []

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))


def _as_texts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(v, int | list) for v in value):
        raise PydanticCustomError(
            "token_array", "arrays of token ids are not supported; send the text itself, as a string or a list of them"
        )
    return value


class EmbeddingRequest(_Request):
    """Body of ``POST /v1/embeddings``."""

    input: Annotated[list[Text], BeforeValidator(_as_texts), Field(min_length=1)] | None = None
    """A text or a list of texts."""
    messages: list[Message] | None = Field(None, min_length=1)
    """In place of ``input``: the texts and images of one item."""
    encoding_format: Literal["float", "base64"] = "float"
    """``base64`` is little-endian float32, the openai client's default."""
    dimensions: int | None = None
    """Accepted only where it equals the model's own."""
    instruction: Text | None = None
    """Extension: embedding instruction of the items; by default the checkpoint's."""

    @model_validator(mode="after")
    def _one_source(self) -> EmbeddingRequest:
        if (self.input is None) == (self.messages is None):
            raise PydanticCustomError(
                "one_source", "give either 'input' (texts) or 'messages' (one item with images)", {"param": "input"}
            )
        return self


class StreamOptions(BaseModel):
    include_usage: bool = False


StopText = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``."""

    ignored = _Request.ignored | {"prompt_cache_key", "parallel_tool_calls"}
    neutral = {
        "audio": (None,),
        "frequency_penalty": (None, 0),
        "function_call": (None, "none"),
        "functions": (None, []),
        "logit_bias": (None, {}),
        "logprobs": (None, False),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "presence_penalty": (None, 0),
        "reasoning_effort": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "top_logprobs": (None, 0),
        "verbosity": (None,),
        "web_search_options": (None,),
    }

    messages: list[Message] = Field(min_length=1)
    mode: Literal["native", "compressed"] = "native"
    """Extension: answer from the full context, or from the chorus tokens alone."""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name of ``max_tokens``; takes precedence."""
    temperature: float | None = Field(None, ge=0, le=2)
    """By default 0: always the most likely token."""
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    stop: (
        Annotated[list[StopText], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    instruction: Text | None = None
    """Extension: embedding instruction before the chorus tokens."""


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for the first of pydantic's errors: the place and what was expected, without the value."""
    first = errors[0]
    location = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if not location and first["type"] in ("missing", "model_attributes_type", "dict_type", "model_type"):
        return ApiError(400, "the body must be a JSON object sent as application/json", code="invalid_body")
    param = first.get("ctx", {}).get("param") or _param(location)
    prefix = "" if "param" in first.get("ctx", {}) else f"{param}: "
    return ApiError(400, f"{prefix}{first['msg']}", param=param, code=str(first["type"]))


def _param(location: Sequence[str | int]) -> str:
    """``messages[0].content[1].image_url.url``, without the tag that pydantic adds for a part's type."""
    path = ""
    for i, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (i >= 2 and isinstance(location[i - 1], int) and location[i - 2] == "content"):
            path += f".{part}" if path else part
    return path
