"""``crem serve`` as a user runs it: a process of its own, used over HTTP."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crem.errors import CremError
from pipelines.demo.demo_report import Chat, Search, SearchHit, ServeReport
from pipelines.search.opened_index import VectorIndex
from pipelines.tables.prepared import PreparedRows, read_rows

__all__ = ["serve_and_query"]

log = logging.getLogger(__name__)

_QUERIES = ("red apple", "grinning cat", "musical note", "sailboat", "birthday cake")
_CHATS = 4
_HITS = 5
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 30.0


def serve_and_query(model: str, index: str, prepared: str, log_file: Path) -> ServeReport:
    """Serve ``model``, search the index with embeddings of the server, and ask it questions of the test rows.

    Raises:
        CremError: the server does not start.
    """
    began = time.monotonic()
    with _server(model, log_file) as url:
        seconds_until_ready = round(time.monotonic() - began, 1)
        log.info("server ready at %s", url)
        searches, seconds = _search(url, VectorIndex(index))
        return ServeReport(
            seconds_until_ready=seconds_until_ready,
            searches=searches,
            embedding_request_s=round(float(np.median(seconds)), 4),
            chats=_chat(url, read_rows(prepared, split_prefix="test")),
        )


@contextmanager
def _server(model: str, log_file: Path) -> Iterator[str]:
    """The URL of a server that is stopped on leaving; by force if it does not shut its Ray down in time."""
    command = [sys.executable, "-m", "crem.cli", "serve", model, "--preset", "micro", "serve.port=0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    with open(log_file, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield _address(server, log_file)
    finally:
        if server.poll() is None:
            server.terminate()
            try:
                server.wait(timeout=_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _address(server: subprocess.Popen[bytes], log_file: Path) -> str:
    """The URL that the server logs once it is ready."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        if ready := re.search(r"serving \S+ at (http://\S+)\n", log_file.read_text(errors="replace")):
            return ready[1]
        time.sleep(0.2)
    tail = log_file.read_text(errors="replace").strip().splitlines()[-3:]
    raise CremError(
        f"the server did not start within {_START_TIMEOUT_S:.0f} s; the end of {log_file}: {' | '.join(tail)}"
    )


def _search(url: str, index: VectorIndex) -> tuple[list[Search], list[float]]:
    """The searches, and the seconds of each embedding request."""
    searches, seconds = [], []
    for text in _QUERIES:
        answer, took = _post(f"{url}/v1/embeddings", {"model": "model", "input": text})
        vector = np.array([answer["data"][0]["embedding"]], dtype=np.float32)
        hits = [SearchHit(hit.id, hit.uri, round(hit.score, 4)) for hit in index.search(vector, _HITS)[0]]
        searches.append(Search(text, hits))
        seconds.append(took)
    return searches, seconds


def _chat(url: str, rows: PreparedRows) -> list[Chat]:
    """Some questions of the rows, in both modes."""
    questions = [row for row in rows.table.to_pylist() if row["question"]]
    chats = []
    for row in questions[:: max(1, len(questions) // _CHATS)][:_CHATS]:
        image = row["query"]["images"][0]
        data_url = "data:image/png;base64," + base64.b64encode(rows.image(image)).decode()
        content = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": row["question"]}]
        body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 16}
        (native, native_s), (compressed, compressed_s) = (
            _post(f"{url}/v1/chat/completions", {**body, "mode": mode}) for mode in ("native", "compressed")
        )
        chats.append(
            Chat(
                question=row["question"],
                expected=row["answer"],
                image=image,
                native=native["choices"][0]["message"]["content"],
                native_s=round(native_s, 3),
                compressed=compressed["choices"][0]["message"]["content"],
                compressed_s=round(compressed_s, 3),
            )
        )
    return chats


def _post(url: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The JSON that answers a request (OpenAI's format), and the seconds that it took."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read()), time.monotonic() - began
