"""The HTTP routes, with OpenAI's requests and responses, and the handlers that turn every failure into its error
envelope."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crem.config import ServeConfig
from serve.deployments import ModelCard, ModelClient
from serve.engine import Delta
from serve.protocol import ApiError, ChatRequest, EmbeddingRequest, Json, validation_error
from serve.translation import CompletionWriter, embedding_response, generation_request, items_of

__all__ = ["create_app"]

logger = logging.getLogger(__name__)
router = APIRouter()


def create_app(client: ModelClient, config: ServeConfig) -> FastAPI:
    """The ASGI application over a model."""
    app = FastAPI(title="CREM", docs_url=None, redoc_url=None)  # the documentation pages load scripts from other hosts
    app.state.client, app.state.config = client, config
    app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=config.max_request_bytes)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_internal_error)
    return app


def _client(request: Request) -> ModelClient:
    return request.app.state.client


def _config(request: Request) -> ServeConfig:
    return request.app.state.config


Client = Annotated[ModelClient, Depends(_client)]
Config = Annotated[ServeConfig, Depends(_config)]


@router.get("/health")
async def health(client: Client) -> JSONResponse:
    """200 once a replica has loaded the model, else 503."""
    card = await client.card()
    if not await client.ready():
        raise ApiError(503, "no replica of the model is running; try again later", code="not_ready")
    return JSONResponse({"status": "ok", "model": card.name, "fingerprint": card.fingerprint})


@router.get("/v1/models")
async def models(client: Client) -> Json:
    return {"object": "list", "data": [_model_object(await client.card())]}


@router.get("/v1/models/{name:path}")
async def model(name: str, client: Client) -> Json:
    return _model_object(await _served(name, client))


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, client: Client, config: Config) -> JSONResponse:
    card = await _served(body.model, client)
    if body.dimensions not in (None, card.dim):
        raise ApiError(
            400,
            f"dimensions: {card.name} has {card.dim} and cannot be cut to {body.dimensions}; leave it out",
            param="dimensions",
            code="unsupported_dimensions",
        )
    results = await client.embed(items_of(body, config.max_inputs))
    return JSONResponse(embedding_response(card.name, body, results))


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, client: Client, config: Config) -> Any:
    card = await _served(body.model, client)
    request = generation_request(body, config.max_new_tokens)
    writer = CompletionWriter(card.name)
    if not body.stream:
        return JSONResponse(writer.complete(*await client.complete(request)))
    deltas = client.stream(request)
    first = await anext(deltas)  # a refusal gets an HTTP status instead of an event in a stream with status 200
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamingResponse(_events(writer, first, deltas, with_usage), media_type="text/event-stream")


async def _events(
    writer: CompletionWriter, delta: Delta, deltas: AsyncGenerator[Delta], with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: role, text, finish reason, optionally usage, ``[DONE]``."""
    yield _event(writer.role())
    try:
        async with aclosing(deltas):
            while True:
                if delta.text:
                    yield _event(writer.text(delta.text))
                if delta.ending is not None:
                    break
                delta = await anext(deltas)
        yield _event(writer.finish(delta.ending.finish_reason))
        if with_usage:
            yield _event(writer.usage(delta.ending))
    except ApiError as error:
        yield _event(error.body)
    except Exception:
        logger.exception("a stream failed")
        yield _event(_internal_error().body)
    yield "data: [DONE]\n\n"


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _served(name: str | None, client: ModelClient) -> ModelCard:
    card = await client.card()
    if name not in (None, card.name):
        raise ApiError(
            404,
            f"the model {name[:200]!r} is not served here; this server has {card.name!r}",
            param="model",
            code="model_not_found",
        )
    return card


def _model_object(card: ModelCard) -> Json:
    # OpenAI's clients require `created`; a checkpoint has a fingerprint but no date
    return {
        "id": card.name,
        "object": "model",
        "created": 0,
        "owned_by": "crem",
        "fingerprint": card.fingerprint,
        "dimensions": card.dim,
    }


# --- errors ----------------------------------------------------------------------------------------------------


class BodyLimit:
    """Refuses a body over ``max_bytes`` with 413: by its declared length, or as soon as more than that has arrived."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            return await _answer(self._too_large())(scope, receive, send)
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise _TooLarge(413)
            return message

        await self.app(scope, bounded, send)

    def _too_large(self) -> ApiError:
        return _too_large(self.max_bytes)


class _TooLarge(HTTPException):
    """Raised while FastAPI reads a body; an ``HTTPException``, because FastAPI wraps all others."""


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is over this server's limit of {max_bytes} bytes; send fewer or smaller items",
        code="request_too_large",
    )


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _internal_error() -> ApiError:
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(validation_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, _TooLarge):
        return _answer(_too_large(_config(request).max_request_bytes))
    what = {404: "there is no such route", 405: "this route does not take that method"}.get(
        error.status_code, str(error.detail)
    )
    return _answer(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {what}"))


async def _on_internal_error(request: Request, error: Exception) -> JSONResponse:
    return _answer(_internal_error())
