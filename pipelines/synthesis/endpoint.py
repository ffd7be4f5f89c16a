"""One request to an OpenAI-compatible endpoint, and what its outcome means for the row and for the job.

Why not ``ray.data.llm``'s ``HttpRequestProcessorConfig`` (Ray 2.60): it does not retry status 500 and does not read
``Retry-After``; its pauses have no jitter and double without bound; it takes any other status, 401 and 400 among them,
for an answer; its rate holds per batch and not for the job; an exhausted row ends the job with an exception that
carries the whole payload, images included; and it can neither stop at a cost nor keep the answers of a batch that is
killed. So ``openai``'s client sends the requests, with its own retries off: every attempt is counted before it is sent.

Endpoints differ in what they accept. A request is first sent in the strictest form; where an endpoint refuses a field
by name, the form is relaxed for all further requests (``Dialect``).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crem.config import SynthesiseConfig
from crem.errors import ConfigError, CremError
from pipelines.synthesis.question_answers import answer_schema
from pipelines.synthesis.question_prompt import Message

__all__ = ["KEY", "Completion", "Endpoint", "EndpointAwayError", "EndpointBusyError", "RequestRefusedError", "host_of"]

log = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
"""Environment variable of the key, on the driver and on every worker."""
_MODES = ("json_schema", "json_object", "text")
_LONGEST_DETAIL = 300


class EndpointBusyError(CremError):
    """The endpoint asks for fewer requests (429). The request is repeated after a pause of all workers.

    Attributes:
        pause_s: what it said in ``Retry-After``; None where it said nothing.
    """

    def __init__(self, message: str, pause_s: float | None):
        super().__init__(message, pause_s)
        self.message, self.pause_s = message, pause_s

    def __str__(self) -> str:
        return self.message


class EndpointAwayError(EndpointBusyError):
    """No answer, or one that is the server's fault: refused connection, timeout, 5xx, a body that breaks off."""


class RequestRefusedError(CremError):
    """The endpoint will not take this request (400, 413, 422): the row is at fault, not the endpoint."""


class _Choice(BaseModel):
    class _Message(BaseModel):
        content: str | None = None
        refusal: str | None = None

    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True)
class Completion:
    """What came back."""

    text: str
    cut: bool
    """Whether the answer was cut at ``synthesise.max_answer_tokens``."""
    refused: bool
    """Whether the model declined, or a filter did."""
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Dialect:
    """The form of a request that the endpoint is known to accept."""

    response_format: str
    """One of ``_MODES``."""
    limit_field: str = "max_tokens"
    temperature: bool = True

    def after(self, complaint: str, *, relax: bool) -> Dialect | None:
        """The form to try after a refusal; None where the complaint is about something else."""
        if self.limit_field == "max_tokens" and "max_completion_tokens" in complaint:
            return replace(self, limit_field="max_completion_tokens")
        if self.temperature and "temperature" in complaint:
            return replace(self, temperature=False)
        about_format = any(word in complaint for word in ("response_format", "json_schema", "json_object", "guided"))
        if relax and about_format and self.response_format != _MODES[-1]:
            return replace(self, response_format=_MODES[_MODES.index(self.response_format) + 1])
        return None


class Endpoint:
    """An open connection to the endpoint of ``synthesise.base_url``; one per worker.

    Args:
        kinds: of the pairs of a valid answer.

    Raises:
        ConfigError: there is no address.
    """

    def __init__(self, config: SynthesiseConfig, kinds: Sequence[str]):
        if not config.base_url or not config.model:
            missing = "base_url" if not config.base_url else "model"
            raise ConfigError(
                f"synthesise.{missing} is not set; name the endpoint and its model: "
                "synthesise.base_url=http://HOST:8000/v1 synthesise.model=NAME"
            )
        self.config, self.kinds = config, kinds
        self.host = host_of(config.base_url)
        self.dialect = Dialect(_MODES[0] if config.structured == "auto" else config.structured)
        self._key = os.environ.get(KEY, "")
        # a server of one's own needs no key, and openai's client insists on one
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=self._key or "none", max_retries=0, timeout=config.timeout_s
        )

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, messages: Sequence[Message]) -> Completion:
        """Send one request.

        Raises:
            EndpointBusyError, EndpointAwayError: to be sent again later. RequestRefusedError: not to be sent again.
            ConfigError: no request can succeed: wrong key, model or address, or no money left.
        """
        used = self.dialect
        try:
            answer = await self._client.chat.completions.with_raw_response.create(**self._request(messages, used))
            return self._completion(answer.http_response.content, messages)
        except openai.APIStatusError as error:
            complaint = self._complaint(error)
            if error.status_code in (400, 422) and self._adapted(used, complaint):
                return await self.complete(messages)
            raise self._meaning(error, complaint) from None
        except openai.APIConnectionError as error:  # timeouts are a kind of it
            raise EndpointAwayError(
                self._clean(f"{self.host}: {error} ({error.__cause__ or 'timeout'})"), None
            ) from None

    async def probe(self) -> bool:
        """Whether the endpoint answers the smallest request."""
        messages: list[Message] = [{"role": "user", "content": "Answer with the word yes."}]
        try:
            await self.complete(messages)
        except (EndpointBusyError, RequestRefusedError):
            return False
        return True

    def _request(self, messages: Sequence[Message], dialect: Dialect) -> dict[str, Any]:
        config = self.config
        request: dict[str, Any] = {
            "model": config.model,
            "messages": list(messages),
            dialect.limit_field: config.max_answer_tokens,
            "extra_body": dict(config.request),
        }
        if dialect.temperature:
            request["temperature"] = config.temperature
        if dialect.response_format == "json_schema":
            schema = {"name": "pairs", "strict": True, "schema": answer_schema(self.kinds)}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif dialect.response_format == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _completion(self, body: bytes, messages: Sequence[Message]) -> Completion:
        try:
            content = _Body.model_validate_json(body)
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise EndpointAwayError(self._clean(f"{self.host}: status 200 with {body[:80]!r}: {what}"), None) from None
        choice = content.choices[0]
        text = choice.message.content or ""
        usage = content.usage or _Usage()
        return Completion(
            text=text,
            cut=choice.finish_reason == "length",
            refused=bool(choice.message.refusal) or choice.finish_reason == "content_filter",
            # an endpoint that does not count must not be free of bounds
            prompt_tokens=usage.prompt_tokens or _estimated_tokens(messages),
            answer_tokens=usage.completion_tokens or len(text) // 3,
        )

    def _adapted(self, used: Dialect, complaint: str) -> bool:
        """Whether there is another form to try; concurrent requests that were refused alike relax it once."""
        if used != self.dialect:
            return True
        following = used.after(complaint, relax=self.config.structured == "auto")
        if following is None:
            return False
        log.info("%s refuses a field (%s): requests are now sent as %s", self.host, complaint, following)
        self.dialect = following
        return True

    def _meaning(self, error: openai.APIStatusError, complaint: str) -> CremError:
        status, what = error.status_code, f"{self.host}: status {error.status_code}: {complaint}"
        if status == 402 or "insufficient_quota" in complaint:
            return ConfigError(f"{what}; the account has no money left: pay, and run again to continue")
        if status in (401, 403):
            state = "was refused" if self._key else "is not set"
            return ConfigError(f"{what}; {KEY} {state} (it is read from the environment of every worker)")
        if status in (404, 405):
            return ConfigError(
                f"{what}; is synthesise.base_url right, with its /v1, and does it serve {self.config.model!r}?"
            )
        pause_s = _retry_after_s(error.response.headers)
        if status == 429:
            return EndpointBusyError(what, pause_s)
        if status >= 500 or status in (408, 409, 425):
            return EndpointAwayError(what, pause_s)
        return RequestRefusedError(what)

    def _complaint(self, error: openai.APIStatusError) -> str:
        """What the server says: its message, parameter and code, in one line."""
        body = error.body if isinstance(error.body, dict) else {}
        said = [body.get("message") or error.response.text, body.get("param"), body.get("code")]
        return self._clean(" ".join(str(part) for part in dict.fromkeys(said) if part))

    def _clean(self, text: str) -> str:
        """One line without the key, which some servers repeat."""
        line = " ".join((text.replace(self._key, "<key>") if self._key else text).split())
        return line if len(line) <= _LONGEST_DETAIL else line[:_LONGEST_DETAIL] + " …"


def host_of(base_url: str) -> str:
    """Host and port of an address, without the user and password that it may hold."""
    parts = urlsplit(base_url)
    return f"{parts.hostname or base_url}{f':{parts.port}' if parts.port else ''}"


def _retry_after_s(headers: Any) -> float | None:
    """Seconds of a ``Retry-After`` header, which holds seconds or a date, or of OpenAI's in milliseconds."""
    try:
        if in_ms := headers.get("retry-after-ms"):
            return max(0.0, float(in_ms) / 1000)
        value = headers.get("retry-after")
        if not value:
            return None
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _estimated_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a request whose answer does not say: a third of its characters, and 1,300 an image."""
    parts = [p for m in messages for p in (m["content"] if isinstance(m["content"], list) else [m["content"]])]
    images = sum(isinstance(part, dict) and part["type"] == "image_url" for part in parts)
    texts = [part for part in parts if not (isinstance(part, dict) and part["type"] == "image_url")]
    return len(json.dumps(texts)) // 3 + 1_300 * images
