"""Both sides of the Ray boundary: the replica that holds a model, and the client through which routes call it.

Choices:

- One replica has **one model** and serves all three with it: embeddings, native and compressed answers.
- **One step at a time.** Every forward of a replica (a batch of embeddings, or one decoding step of one answer) runs
  on the replica's single worker thread, first come, first served. Torch already uses all of its threads, so parallel
  steps would not be faster; the queue needs no lock, the event loop stays free, and an embedding waits for one token
  of a long answer, not for its end.
- Embeddings are batched by **item**: the inputs of one request and of its neighbours share forwards.
- A bad item is a **value**, not an exception: it fails its own request, leaves no traceback in the log, and passes
  through Ray unchanged.
- A cancelled request (the client disconnected) closes its iterator, which ends decoding after the current token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

import crem
from crem.config import ServeConfig
from crem.errors import ItemError
from serve.engine import Delta, Embedded, Ending, Engine, GenerationRequest
from serve.protocol import ApiError

__all__ = ["Activity", "ModelCard", "ModelClient", "ModelReplica", "bind_model"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_AFTER_S = 1
"""Seconds after which a client of an overloaded server should retry. Source: ours; the openai client obeys it."""
RETRY = {"Retry-After": str(RETRY_AFTER_S)}
STATUS_TIMEOUT_S = 5.0
"""Longest wait for the controller's status of the replicas."""


@dataclass(frozen=True)
class ModelCard:
    """Public facts about the served model."""

    name: str
    fingerprint: str
    dim: int


@dataclass
class Activity:
    """Counters of a replica."""

    answering: int = 0
    """answers being decoded"""
    batches: int = 0
    """batches of embeddings computed so far"""
    deltas: int = 0
    """pieces of answers decoded so far"""


class ModelReplica:
    """One model in memory, with a queue of steps."""

    def __init__(self, model: str, name: str, config: ServeConfig):
        import torch

        torch.set_num_threads(config.threads_per_replica)
        loaded = crem.load(model, chorus_tokens=config.chorus_tokens)
        self._engine = Engine(loaded)
        self._card = ModelCard(name, loaded.fingerprint, loaded.dim)
        self._steps = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-step")
        self._activity = Activity()
        self._embed_one.set_max_batch_size(config.max_batch_size)
        self._embed_one.set_batch_wait_timeout_s(config.batch_wait_s)
        logger.info("serving %s, fingerprint %s, on %s", name, loaded.fingerprint, loaded.device)

    async def card(self) -> ModelCard:
        return self._card

    async def activity(self) -> Activity:
        return self._activity

    async def embed(self, items: Sequence[crem.Item]) -> list[Embedded | ItemError]:
        """One result per item, in order."""
        results = await asyncio.gather(*(self._embed_one(item) for item in items))
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, ItemError):
                raise result
        return results

    @serve.batch
    async def _embed_one(self, items: list[crem.Item]) -> list[Embedded | Exception]:
        self._activity.batches += 1
        return await self._step(self._engine.embed, items)

    async def complete(self, request: GenerationRequest) -> tuple[str, Ending] | ItemError:
        """The complete answer and its ending."""
        pieces, ending = [], None
        async with aclosing(self.stream(request)) as deltas:
            async for delta in deltas:
                if isinstance(delta, ItemError):
                    return delta
                pieces.append(delta.text)
                ending = delta.ending
        assert ending is not None, "the last delta of an answer has its ending"
        return "".join(pieces), ending

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Delta | ItemError]:
        """The answer piece by piece; for a bad item the ``ItemError`` as the only piece."""
        steps = self._engine.generate(request)
        self._activity.answering += 1
        try:
            while (delta := await self._step(next, steps, None)) is not None:
                self._activity.deltas += 1
                yield delta
        except ItemError as error:
            yield error
        finally:
            self._activity.answering -= 1
            self._steps.submit(steps.close)  # queued after the step that may still be running

    async def _step(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._steps, function, *args)


def bind_model(model: str, name: str, config: ServeConfig) -> serve.Application:
    """The model's deployment, scaled and bounded by ``config``."""
    deployment = serve.deployment(
        ModelReplica,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=max(config.min_replicas, config.max_replicas),
            target_ongoing_requests=config.target_ongoing_requests,
        ),
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    )
    return deployment.bind(model, name, config)


class ModelClient:
    """The model as the routes see it: Ray's failures become ``ApiError``."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._card: ModelCard | None = None

    async def card(self) -> ModelCard:
        """The model's card, cached, since the ingress restarts with the model. ``ApiError`` 503 until it is loaded."""
        if self._card is None:
            if not await self.ready():
                raise ApiError(503, "the model is not loaded yet; try again later", code="not_ready", headers=RETRY)
            self._card = await _translated(self._handle.card.remote())
        assert self._card is not None
        return self._card

    async def ready(self) -> bool:
        """Whether at least one replica has loaded the model; asks the controller, not the replicas' request queue."""
        context = serve.get_replica_context()
        status = await asyncio.wait_for(asyncio.to_thread(serve.status), STATUS_TIMEOUT_S)
        application = status.applications.get(context.app_name)
        deployment = application and application.deployments.get(ModelReplica.__name__)
        return bool(deployment and deployment.replica_states.get("RUNNING", 0))

    async def embed(self, items: Sequence[crem.Item]) -> list[Embedded | ItemError]:
        return await _translated(self._handle.embed.remote(items))

    async def complete(self, request: GenerationRequest) -> tuple[str, Ending]:
        result = await _translated(self._handle.complete.remote(request))
        if isinstance(result, ItemError):
            raise ApiError.of_item(result, "messages")
        return result

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Delta]:
        response = self._handle.options(stream=True).stream.remote(request)
        try:
            while True:
                try:
                    delta = await _translated(anext(response))
                except StopAsyncIteration:
                    return
                if isinstance(delta, ItemError):
                    raise ApiError.of_item(delta, "messages")
                yield delta
        finally:
            response.cancel()  # has no effect on a stream that has ended


async def _translated(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except BackPressureError as error:
        raise ApiError(
            429,
            f"the server is at its limit of {error.args[1]} waiting requests; try again later",
            code="overloaded",
            headers=RETRY,
        ) from error
    except (DeploymentUnavailableError, ReplicaUnavailableError, RayActorError) as error:
        raise ApiError(
            503,
            "the model is not available at the moment; try again later",
            code="model_unavailable",
            headers=RETRY,
        ) from error
