"""Submit a job to a running Ray cluster through Ray's job client, follow its output, return its exit code.

A job's command line is what one would type on the cluster. It runs the code of the cluster's image or, with
``working_dir``, that folder's code, which Ray uploads. Credentials are never sent: anyone who can reach the dashboard
can read a job's command line and environment. Give them to the pods (``envFrom`` of a secret, see ``manifests/``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from crem.errors import CremError

__all__ = ["SubmitError", "job_server_url", "submit"]

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_TIMEOUT_S = 10.0
INTERRUPTED = 130
STOPPED = 143
# Left out of an upload, besides what the folder's .gitignore names.
EXCLUDES = [".git", ".venv", "out", "__pycache__", "*.egg-info"]
# Ray lets these override an explicit address; here the explicit address wins.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_PORTS = {"http": 80, "https": 443}
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY", re.IGNORECASE)
_SECRET_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]*@", re.IGNORECASE)


class SubmitError(CremError):
    """A job that cannot be submitted or followed; the message names the value and the remedy."""


def submit(
    argv: Sequence[str],
    *,
    address: str | None = None,
    working_dir: str | os.PathLike[str] | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    follow: bool = True,
) -> int:
    """Run ``argv`` on the cluster.

    Args:
        argv: the complete command line, e.g. ``["crem", "train", "s3://bucket/prepared", "--out", "s3://bucket/run"]``.
        address: URL of the job server; default ``RAY_API_SERVER_ADDRESS``, a ``RAY_ADDRESS`` that is a URL, or
            ``http://127.0.0.1:8265``.
        working_dir: local folder whose code is uploaded for the job; None runs the code of the cluster's image.
        runtime_env: further keys of Ray's runtime environment.
        follow: stream the job's output to standard output until it ends; otherwise return once it is accepted.

    Returns:
        The job's exit code; 0 at once if not followed; 130 after Ctrl-C (the job keeps running), 143 if it was stopped.

    Raises:
        SubmitError: an empty command, credentials in the request, a missing folder, a job server that cannot be
            reached or refuses the request.
    """
    env = _runtime_env(argv, working_dir, runtime_env)
    url = job_server_url(address, os.environ)
    client = _connect(url)
    try:
        job = client.submit_job(entrypoint=shlex.join(argv), runtime_env=env)
    except (RayError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise SubmitError(f"the job server at {url} refused the job: {error}") from error
    logger.info("submitted %s to %s: %s", job, url, shlex.join(argv))
    manual = f"Follow it: ray job logs --follow --address {url} {job}   Stop it: ray job stop --address {url} {job}"
    if not follow:
        logger.info("%s", manual)
        return 0
    try:
        return asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        logger.warning("interrupted here; job %s keeps running. %s", job, manual)
        return INTERRUPTED
    except (RayError, RuntimeError, OSError) as error:
        raise SubmitError(
            f"lost the connection to the job server at {url} while following {job}: {error}. {manual}"
        ) from error


def job_server_url(address: str | None, environ: Mapping[str, str]) -> str:
    """The job server's URL: from an explicit address, else from the environment, else the default.

    Raises:
        SubmitError: an address of another kind (Ray Client, or no URL).
    """
    if address is None:
        named = (environ.get(name, "") for name in _ADDRESS_VARIABLES)
        address = next((value for value in named if value.startswith(("http://", "https://"))), DEFAULT_ADDRESS)
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port is not None or "://" in address)
    except ValueError:
        usable = False
    if not usable or parts.scheme not in _PORTS:
        raise SubmitError(
            f"{address!r} is not the address of a job server; give the dashboard's URL with its port, "
            f"e.g. {DEFAULT_ADDRESS} (on Kubernetes first: kubectl port-forward service/NAME-head-svc 8265)"
        )
    return url.rstrip("/")


def _runtime_env(
    argv: Sequence[str], working_dir: str | os.PathLike[str] | None, runtime_env: Mapping[str, Any] | None
) -> dict[str, Any]:
    if not argv:
        raise SubmitError("no command was given; e.g. crem submit -- doctor")
    env = dict(runtime_env or {})
    secret = [name for name in env.get("env_vars", {}) if _SECRET_NAME.search(name)]
    if secret or any(_SECRET_URI.search(word) for word in argv):
        what = f"the variable {secret[0]}" if secret else "a URI with a password on the command line"
        raise SubmitError(
            f"{what} would be readable in the cluster's dashboard, so it is not sent. Give credentials to the pods "
            "instead: envFrom with a secretRef, as in cluster/manifests/"
        )
    if working_dir is not None:
        if not Path(working_dir).is_dir():
            raise SubmitError(f"working_dir {os.fspath(working_dir)!r} is not a folder; name one, or leave it out")
        env["working_dir"] = os.fspath(working_dir)
        env["excludes"] = [*EXCLUDES, *env.get("excludes", [])]
    return env


def _connect(url: str) -> JobSubmissionClient:
    """A client of exactly this job server; a plain connection, which has a time limit, is tried first."""
    parts = urlsplit(url)
    port = parts.port or _PORTS[parts.scheme]
    remedy = (
        "Is the cluster up, and is this its dashboard's address? On Kubernetes: "
        f"kubectl port-forward service/NAME-head-svc {port}:8265; on one machine: ray start --head"
    )
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise SubmitError(f"no job server answers at {url} ({error}). {remedy}") from error
    try:
        with _without(_ADDRESS_VARIABLES):
            return JobSubmissionClient(url)
    except (RayError, RuntimeError, OSError, ValueError) as error:  # requests' errors are OSErrors
        raise SubmitError(f"{url} is not a job server, or it refuses the token: {error} {remedy}") from error


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


async def _follow(client: JobSubmissionClient, job: str) -> int:
    """Stream the job's output and return its exit code; a broken stream is resumed where it stopped."""
    printed = 0
    while True:
        received = 0
        try:
            async for piece in client.tail_job_logs(job):
                new = piece[max(0, printed - received) :]
                received += len(piece)
                if new:
                    sys.stdout.write(new)
                    sys.stdout.flush()
        except (RuntimeError, aiohttp.ClientError) as error:
            logger.debug("the log stream of %s broke: %s", job, error)
        printed = max(printed, received)
        info = client.get_job_info(job)
        if info.status.is_terminal():
            break
        await asyncio.sleep(0.5)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    reason = (info.message or "").partition("\n")[0]  # the rest repeats the output
    logger.error("job %s %s: %s", job, info.status.value.lower(), reason)
    if info.status == JobStatus.STOPPED:
        return STOPPED
    return info.driver_exit_code or 1
