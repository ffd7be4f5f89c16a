"""The Ray Serve application: how it is built and started.

``build`` makes the application, ``run`` starts it (and Ray, where there is none), ``application`` is the builder that
``serve deploy`` and a RayService name by import path (``serve/config/``).

This module has no ``from __future__ import annotations``: Ray converts a builder's arguments only where the annotation
is the class itself, not its name.
"""

import logging
import math
import os
import re
import signal
import socket
import time
import urllib.request
from typing import Any, Self

import ray
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle

from crem.checkpoint import describe
from crem.config import RunConfig, ServeConfig, load_config
from crem.config.loading import config_error
from crem.config.section import Section
from crem.doctor import refuse_ray_client
from crem.errors import ConfigError, CremError, ResourceError
from serve.deployments import ModelClient, bind_model
from serve.routes import create_app

__all__ = ["ApplicationArgs", "application", "build", "run"]

logger = logging.getLogger(__name__)

APPLICATION = "crem"
INGRESS_ONGOING = 1024
"""Concurrent requests of one ingress replica. Far above the model's capacity, so that overload is answered with 429 at
the model's queue, and ``/health`` still responds."""
REACH_TIMEOUT_S = 15.0
"""Longest wait for the first answer over HTTP once the application runs."""
OBJECT_STORE_BYTES = 512 * 2**20
"""Of a Ray started here. Requests are small and short-lived."""


class Ingress:
    """Parses requests and writes responses; has no model."""

    def __init__(self, model: DeploymentHandle, config: ServeConfig):
        self._model, self._config = model, config

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(ModelClient(self._model), self._config)


def model_name(model: str) -> str:
    """Name under which a checkpoint is served: the last part of its path or URI."""
    return model.rstrip("/").rpartition("/")[2] or model


def build(model: str, config: RunConfig) -> serve.Application:
    """The application that serves the checkpoint at ``model`` (path or URI)."""
    settings = config.serve
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        max_ongoing_requests=INGRESS_ONGOING,
        autoscaling_config=AutoscalingConfig(
            min_replicas=1, max_replicas=max(settings.min_replicas, settings.max_replicas), target_ongoing_requests=128
        ),
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(bind_model(model, model_name(model), settings), settings)


class ApplicationArgs(Section):
    """Arguments of ``application``: the ``args`` of a Serve config file."""

    model: str
    """Checkpoint: folder, URI or the name of a shipped one."""
    preset: str = "2b"
    """Preset whose section ``serve`` is used, or the path of a YAML file."""
    overrides: list[str] = Field(default_factory=list)
    """A list of ``serve.key=value``. Host and port are not among them: the file's ``http_options`` hold these."""

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, args: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Ray validates the arguments itself and shows the error as it is."""
        try:
            return validate(args)
        except ValidationError as error:
            problem = config_error(error, cls)
            raise ConfigError(
                f"args of serve.app:application: {problem}\nCorrect them in the Serve config file and deploy it again"
            ) from None


def application(args: ApplicationArgs) -> serve.Application:
    """Builder for ``serve deploy`` and RayService: ``import_path: serve.app:application``.

    Raises:
        ConfigError: unknown preset or key, a value out of bounds.
    """
    return build(args.model, load_config(args.preset, args.overrides))


def run(model: str, config: RunConfig, *, blocking: bool = False) -> str:
    """Serve the checkpoint and return the base URL; with ``blocking``, return only after an interrupt.

    Joins the Ray of ``RAY_ADDRESS`` or of this process, else starts one here. Port 0 takes a free port.

    Raises:
        ConfigError: the port is taken, or is not that of the Serve that already runs there.
        ResourceError: the machine lacks the devices the config asks for.
        CremError: the model could not be loaded.
    """
    settings = config.serve
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        _check_port(settings.host, settings.port)
        describe(model, settings.chorus_tokens)  # refuses a wrong checkpoint before Serve tries three times to start it
    _connect(settings)
    runs_already = bool(serve.status().proxies)
    if runs_already and not settings.port:
        raise ConfigError(
            "Ray Serve already runs on this cluster and keeps its own port; name that one with serve.port=…, or shut "
            "that Serve down first"
        )
    port = settings.port or _free_port(settings.host)  # only now, when Ray's own processes have taken theirs
    serve.start(http_options=HTTPOptions(host=settings.host, port=port))
    try:
        serve.run(build(model, config), name=APPLICATION)
    except RuntimeError as error:
        reason = _deploy_failure()
        serve.delete(APPLICATION) if runs_already else serve.shutdown()
        raise CremError(f"{model!r} could not be served: {reason}") from error
    url = f"http://{_reachable_host(settings.host)}:{port}"
    _wait_until_reached(url)
    logger.info("serving %s at %s", model_name(model), url)
    if blocking:
        _wait_for_interrupt()
    return url


def _connect(settings: ServeConfig) -> None:
    """Join a Ray, or start one on this machine."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        refuse_ray_client(os.environ["RAY_ADDRESS"])
        ray.init()
        return
    cpus = max(4, os.cpu_count() or 1, math.ceil(settings.cpus_per_replica * settings.min_replicas) + 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    wanted, present = settings.gpus_per_replica * settings.min_replicas, ray.cluster_resources().get("GPU", 0)
    if wanted > present:
        ray.shutdown()
        raise ResourceError(
            f"serve.min_replicas={settings.min_replicas} with serve.gpus_per_replica={settings.gpus_per_replica:g} "
            f"need {wanted:g} GPUs and this machine has {present:g}; set serve.gpus_per_replica=0 to serve on CPU, or "
            "set RAY_ADDRESS to a cluster that has them"
        )


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another with serve.port=…, or serve.port=0 "
                "for any free one"
            ) from error


def _reachable_host(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


def _deploy_failure() -> str:
    """Why the replicas did not start: the last error in Serve's status of them."""
    application = serve.status().applications.get(APPLICATION)
    messages = [d.message for d in application.deployments.values()] if application else []
    errors = re.findall(r"^[\w.]*?(\w+(?:Error|Exception)): (.+)$", "\n".join(messages), re.MULTILINE)
    if not errors:
        return " ".join(filter(None, messages)) or "see Ray's log"
    kind, message = errors[-1]
    return message if kind in ("CheckpointError", "ConfigError", "ResourceError") else f"{kind}: {message}"


def _wait_until_reached(url: str) -> None:
    """Wait until the proxy has the route, shortly after the application runs."""
    deadline = time.monotonic() + REACH_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=REACH_TIMEOUT_S):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the application runs, but {url} does not answer ({error}); a Serve that was already running on "
                    "this cluster keeps its own host and port: ask for those, or shut it down first"
                ) from error
            time.sleep(0.2)


def _wait_for_interrupt() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # also if the shell started this process with interrupts ignored
        signal.signal(number, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        logger.info("shutting down")
        serve.delete(APPLICATION)
