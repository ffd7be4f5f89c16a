"""A Ray cluster of several real nodes on this machine, for tests of what crosses nodes and of job submission.

Each node is its own ``ray start --block``, so that a node can be killed like a machine. Choices:

- ``ray stop`` ends every Ray on the machine, so it is never called. Each node has a session of its own, and its
  processes inherit a variable that names it. Only processes in the session (agents overwrite their environment with
  their title) or with the variable (jobs get sessions of their own) are killed.
- Free ports are chosen beforehand: a metrics port in use crashes a raylet at start.
- Token authentication is on, as on a real cluster, with a token for this cluster alone. Clients run with ``env`` or
  through ``run``: Ray reads the token once per process, so a process that used another token cannot switch.
- Ray puts Unix sockets below its folder, and their paths are limited to 107 bytes: the folder is short, not pytest's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

__all__ = ["LocalCluster", "free_ports"]

_NODE_VARIABLE = "CREM_LOCAL_NODE"
_PORTS = range(20_000, 32_000)  # below Linux' ephemeral ports, which outgoing connections take at any time


def free_ports(count: int) -> list[int]:
    """``count`` distinct loopback ports on which nothing listens now."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"only {len(found)} of {count} ports between {_PORTS.start} and {_PORTS.stop} are free")


class LocalCluster:
    """A head node and ``nodes - 1`` workers, ready when the constructor returns; a context manager.

    Attributes:
        address: of the control store, for ``ray.init(address=…)``.
        job_server: URL of the job server and dashboard.
        env: environment of a client: address, token, this interpreter's scripts first on the path.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        host: str = "127.0.0.1",
        cpus_per_node: int = 2,
        object_store_bytes: int = 100 << 20,
        resources: Sequence[dict[str, float]] = (),
        start_timeout_s: float = 120,
    ):
        """Start the nodes.

        Args:
            nodes: number of nodes, including the head.
            host: address of the head, for nodes in network namespaces of their own.
            cpus_per_node: logical CPUs of each node; they may exceed the machine's.
            object_store_bytes: size of each node's object store in shared memory.
            resources: custom resources by node, for tests of placement; further nodes have none.
            start_timeout_s: time limit until all are alive.

        Raises:
            RuntimeError: a node died at start, with the end of its output, or not all were alive in time.
        """
        self._cpus, self._start_timeout_s = cpus_per_node, start_timeout_s
        self._store_bytes = object_store_bytes
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._folder = Path(tempfile.mkdtemp(prefix="crem-ray-"))
        self._token = secrets.token_hex(16)
        token_file = self._folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self._token)
        gcs_port, dashboard_port, client_port = free_ports(3)
        self.address = f"{host}:{gcs_port}"
        self.job_server = f"http://127.0.0.1:{dashboard_port}"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        }
        self._nodes: list[subprocess.Popen[bytes] | None] = []
        try:
            head = ["--head", f"--port={gcs_port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
            head += [f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
            self._start(head, resources[0] if resources else {}, host=host)
            self._wait(1, start_timeout_s)
            for number in range(1, nodes):
                self.add_node(resources[number] if number < len(resources) else {}, wait=False)
            self._wait(nodes, start_timeout_s)
        except BaseException:
            self.stop()
            raise

    def add_node(
        self,
        resources: dict[str, float] | None = None,
        *,
        wait: bool = True,
        prefix: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> int:
        """Start one more worker node; returns its number (the head is 0).

        Args:
            prefix: words before the node's command line, such as ``unshare`` for its own mount namespace.
            host: its address.
        """
        self._start([f"--address={self.address}", "--include-log-monitor=false"], resources or {}, prefix, host=host)
        if wait:
            self._wait(sum(node is not None for node in self._nodes), self._start_timeout_s)
        return len(self._nodes) - 1

    def kill_node(self, number: int) -> None:
        """Kill node ``number`` (SIGKILL to all of its processes), as if the machine lost power."""
        process = self._nodes[number]
        if process is None:
            return
        tag = self._tag(number)
        # Repeat until none is left: a process may start another before it dies. The session's leader is reaped last, so
        # that its number cannot be reused for another session.
        while members := [p for p in psutil.process_iter() if _belongs(p, session=process.pid, tag=tag)]:
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(members, timeout=5)
        process.wait()
        self._nodes[number] = None

    def alive_nodes(self) -> int:
        """Number of nodes that the head reports as alive; 0 while it does not answer."""
        request = urllib.request.Request(f"{self.job_server}/api/v0/nodes?limit=1000")
        request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                listing: dict[str, Any] = json.load(reply)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return 0
        return sum(node["state"] == "ALIVE" for node in listing["data"]["result"]["result"])

    def sessions(self) -> set[int]:
        """The sessions (``setsid``) of the nodes that run: all that a node starts is in its session or has its tag."""
        return {process.pid for process in self._nodes if process is not None}

    def run(self, command: Sequence[str], *, timeout_s: float = 120, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run a client's command line with ``env`` and capture its output as text."""
        env = {**self.env, **kwargs.pop("env", {})}
        return subprocess.run(command, env=env, timeout=timeout_s, capture_output=True, text=True, **kwargs)

    def stop(self) -> None:
        """Kill all nodes and everything they started; remove the folder. May be called twice."""
        for number in reversed(range(len(self._nodes))):
            self.kill_node(number)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(
        self, arguments: list[str], resources: dict[str, float], prefix: Sequence[str] = (), *, host: str
    ) -> None:
        number = len(self._nodes)
        metrics, agent, agent_grpc, runtime_env = free_ports(4)
        command = [
            *prefix,
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            f"--node-ip-address={host}",
        ]
        command += [f"--num-cpus={self._cpus}", "--num-gpus=0", f"--object-store-memory={self._store_bytes}"]
        command += [f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}"]
        command += [f"--resources={json.dumps(resources)}", "--disable-usage-stats", *arguments]
        if "--head" in arguments:
            command.append(f"--temp-dir={self._folder}")
        env = {**self.env, _NODE_VARIABLE: self._tag(number)}
        with self._output(number).open("wb") as output:
            self._nodes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _output(self, number: int) -> Path:
        return self._folder / f"node-{number}.log"

    def _wait(self, nodes: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while (alive := self.alive_nodes()) < nodes:
            for number, process in enumerate(self._nodes):
                if process is not None and process.poll() is not None:
                    tail = self._output(number).read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"node {number} ended with code {process.returncode} at start:\n{tail}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{alive} of {nodes} nodes were alive after {timeout_s:.0f} s")
            time.sleep(0.2)

    def _tag(self, number: int) -> str:
        return f"{self._name}.{number}"


def _belongs(process: psutil.Process, *, session: int, tag: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return os.getsid(process.pid) == session or process.environ().get(_NODE_VARIABLE) == tag
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False
