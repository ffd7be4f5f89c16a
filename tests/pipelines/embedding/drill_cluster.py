"""Three Ray nodes and an S3 server for drills; each worker node has a network namespace, and can be cut off.

The head, the driver and the S3 server are on a bridge of this machine. Needs root and Linux (``ip netns``).
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from cluster.local import LocalCluster
from tests.s3_server import S3Server

__all__ = ["FAULTY", "DrillCluster", "namespaces_work"]

FAULTY = Path(__file__).parent / "faulty"
"""Folder of ``sitecustomize``, which plants faults in a decoder and a model."""
WORKERS = 2
START_TRIES = 5


def namespaces_work() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


class DrillCluster:
    """The nodes, their network and the server; a context that removes all of it."""

    def __init__(self, folder: Path):
        self.stack = contextlib.ExitStack()
        with self.stack:
            self._begin(folder)
            self.stack = self.stack.pop_all()

    def _begin(self, folder: Path) -> None:
        self.name = f"cr{secrets.token_hex(3)}"
        self.subnet = f"10.213.{secrets.randbelow(254) + 1}"
        self.head = f"{self.subnet}.1"
        _ip("link", "add", self.name, "type", "bridge")
        self.stack.callback(_ip, "link", "del", self.name)
        _ip("addr", "add", f"{self.head}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        for worker in range(1, WORKERS + 1):
            self._make_namespace(worker)
        (folder / "s3").mkdir()
        self.s3 = S3Server(folder / "s3", host=self.head)
        self.stack.callback(self.s3.kill)
        path = [str(FAULTY), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
        os.environ |= {
            "AWS_ENDPOINT_URL": self.s3.endpoint,
            "AWS_ACCESS_KEY_ID": self.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
            "AWS_REGION": self.s3.region,
            "AWS_DEFAULT_REGION": self.s3.region,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        self.ray = self.stack.enter_context(LocalCluster(1, host=self.head, start_timeout_s=300))
        self._of_worker: dict[int, int] = {}
        for worker in range(1, WORKERS + 1):
            self.start(worker)

    def _make_namespace(self, worker: int) -> None:
        outer, inner, space = self._link(worker), f"{self._link(worker)}p", self._space(worker)
        _ip("netns", "add", space)
        self.stack.callback(_ip, "netns", "del", space)  # with its end of the link
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", space)
        _ip("link", "set", outer, "master", self.name, "up")
        _ip("-n", space, "addr", "add", f"{self.subnet}.{worker + 1}/24", "dev", inner)
        _ip("-n", space, "link", "set", inner, "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def _link(self, worker: int) -> str:
        return f"{self.name}v{worker}"

    def _space(self, worker: int) -> str:
        return f"{self.name}n{worker}"

    def start(self, worker: int) -> None:
        """Start the Ray node of a worker in its namespace."""
        prefix = ["ip", "netns", "exec", self._space(worker)]
        host = f"{self.subnet}.{worker + 1}"
        for _ in range(START_TRIES):
            with contextlib.suppress(RuntimeError):  # on a busy machine a raylet has not started after Ray's 30 s
                self._of_worker[worker] = self.ray.add_node(prefix=prefix, host=host)
                return
            self.ray.kill_node(len(self.ray._nodes) - 1)
        raise RuntimeError(f"the node of worker {worker} does not start")

    def kill(self, worker: int) -> None:
        """SIGKILL to all processes of the node."""
        self.ray.kill_node(self._of_worker.pop(worker))

    def any_worker(self, draw: random.Random) -> int:
        """A worker whose node is there; where another one is gone, it comes back first."""
        self.restore()
        return draw.randint(1, WORKERS)

    def cut(self, worker: int) -> None:
        """Take the node off the network; its processes go on."""
        _ip("link", "set", self._link(worker), "down")

    def heal(self, worker: int) -> None:
        """Put it back."""
        _ip("link", "set", self._link(worker), "up")

    def drain(self, worker: int, seconds: int) -> None:
        """Tell Ray that the node will be taken away, as a cloud tells of a spot node; then it is."""
        nodes = self.ray.run(
            [sys.executable, "-c", "import ray; ray.init(logging_level=40); print(*[n['NodeID'] for n in ray.nodes() "
             f"if n['Alive'] and n['NodeManagerAddress'] == '{self.subnet}.{worker + 1}'])"]
        )  # fmt: skip
        node = nodes.stdout.split()[-1]
        command = ["-m", "ray.scripts.scripts", "drain-node", f"--address={self.ray.address}", f"--node-id={node}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        done = self.ray.run([sys.executable, *command, f"--deadline-remaining-seconds={seconds}"])
        assert done.returncode == 0, done.stderr[-2000:]

    def restore(self) -> None:
        """Bring back what a drill took away: the server, the network, and both worker nodes."""
        if self.s3._process is None:
            self.s3.start()
        for worker in range(1, WORKERS + 1):
            self.heal(worker)
            number = self._of_worker.get(worker)
            node = None if number is None else self.ray._nodes[number]
            if node is None or node.poll() is not None:  # a node that was taken for dead ends itself
                if number is not None:
                    self.kill(worker)
                self.start(worker)
        self.ray._wait(1 + WORKERS, 180)

    def processes(self, title: str) -> list[psutil.Process]:
        """Ray's processes of this cluster whose title holds this text."""
        sessions, found = self.ray.sessions(), []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) in sessions and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
