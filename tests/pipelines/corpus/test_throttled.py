"""A store that answers part of the requests with ``SlowDown``: the tables are those of a store that does not."""

from __future__ import annotations

import http.client
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs

from pipelines.tables.manifest import PrepareManifest, table_parts
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import encoded, random_image, write_rows
from tests.s3_server import S3Server

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow down</Message></Error>"


@contextmanager
def throttling(endpoint: str, every: int) -> Iterator[tuple[str, list[str]]]:
    """A server that passes requests on to ``endpoint``, but refuses one of ``every``; its address, and those."""
    address = urlsplit(endpoint).netloc
    numbers, refused = itertools.count(1), list[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if next(numbers) % every == 0:
                refused.append(f"{self.command} {self.path}")
                self._answer(503, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else SLOW_DOWN)
                return
            connection = http.client.HTTPConnection(address, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host among them: the signature covers it
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in ("transfer-encoding", "connection")]
            self._answer(answer.status, headers, answer.read())
            connection.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response(status)
            for name, value in headers:
                if self.command == "HEAD" or name.lower() != "content-length":
                    self.send_header(name, value)
            if self.command != "HEAD" and status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", refused
        server.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_store_that_throttles_changes_nothing(
    tmp_path: Path, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (tmp_path / "c" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / "images" / f"{number}.png").write_bytes(encoded(random_image(number, (60, 50))))
    write_rows(
        tmp_path / "c" / "rows" / "a.jsonl",
        [{"key": str(i), "query_images": [f"{i}.png"], "target_text": f"t{i}"} for i in range(30)],
    )
    fs = s3fs.S3FileSystem()
    fs.put(str(tmp_path / "c"), f"{s3_env.bucket}/throttled/c", recursive=True)
    place = f"s3://{s3_env.bucket}/throttled"

    def prepare(out: str) -> None:
        command = [sys.executable, "-m", "crem.cli", "prepare", f"{place}/c", "--out", f"{place}/{out}"]
        run = subprocess.run([*command, "--preset", "micro"], capture_output=True, text=True, timeout=400)
        assert run.returncode == 0, run.stderr[-2000:]

    prepare("good")
    with throttling(s3_env.endpoint, every=5) as (endpoint, refused), monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # else botocore hides most of it from us
        prepare("out")
    assert len(refused) > 20
    good, found = (PrepareManifest.read(Folder.at(f"{place}/{name}")) for name in ("good", "out"))
    assert good is not None and found is not None
    assert (found.rows_out, found.rejected, found.images) == (30, 0, 30)
    assert found.content_id == good.content_id
    for table in ("rows", "images"):
        good_parts, parts = (table_parts(Folder.at(f"{place}/{name}"), table) for name in ("good", "out"))
        assert parts == good_parts
        for part in parts:
            assert fs.cat_file(f"{place}/out/{table}/{part}") == fs.cat_file(f"{place}/good/{table}/{part}")
