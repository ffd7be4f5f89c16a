"""An OpenAI-compatible server on a real socket that answers as it is told: well, badly, late or not at all.

``behave`` is called for each request with its number and parsed body; it returns a ``Reply``. Every request is kept.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What to send back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_at: int | None = None
    """Bytes of the body after which the connection is closed."""


@dataclass(frozen=True)
class Request:
    """What came in."""

    at: float
    """``time.monotonic()``"""
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")

    @property
    def images(self) -> list[str]:
        content = self.body["messages"][-1]["content"]
        return [] if isinstance(content, str) else [p["image_url"]["url"] for p in content if p["type"] == "image_url"]


def completion(text: str, *, finish: str = "stop", usage: tuple[int, int] | None = (100, 20)) -> bytes:
    """A body of ``/v1/chat/completions``."""
    body: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return json.dumps(body).encode()


def good(request: Request, pairs: int = 1) -> Reply:
    """A valid answer about whatever was asked."""
    answer = [{"kind": "describe", "question": f"What is it? {i}", "answer": f"thing {i}"} for i in range(pairs)]
    return Reply(body=completion(json.dumps({"pairs": answer})))


def refusal(status: int, message: str, **headers: str) -> Reply:
    """An error in OpenAI's envelope."""
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


class AnsweringServer(ThreadingHTTPServer):
    """See the module's docstring."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave: Callable[[int, Request], Reply], port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.behave, self.requests, self.lock = behave, [], threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.connections: set[socket.socket] = set()

    requests: list[Request]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def server_close(self) -> None:
        """Also end the connections that clients keep open: a server that is away answers nobody."""
        super().server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: AnsweringServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.connections.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        request = Request(time.monotonic(), body, {name.lower(): value for name, value in self.headers.items()})
        with server.lock:
            number = len(server.requests)
            server.requests.append(request)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            reply = server.behave(number, request)
            time.sleep(reply.delay_s)
        finally:
            with server.lock:
                server.in_flight -= 1
        self.send_response(reply.status)
        for name, value in ({"content-type": "application/json"} | reply.headers).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body[: reply.cut_at])
        if reply.cut_at is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


@contextmanager
def answering(behave: Callable[[int, Request], Reply], port: int = 0) -> Iterator[AnsweringServer]:
    """A server that runs for the block."""
    server = AnsweringServer(behave, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
