"""Images by URL: only from hosts that are allowed, at addresses that were checked, in bounded bytes and time."""

from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crem.config import ImageAccess, ImageConfig
from crem.errors import ItemError, StorageError
from pipelines.sources.url_reader import _pool, read_url

LIMITS = ImageConfig(max_source_bytes=100_000)
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(1000)


class Site(http.server.ThreadingHTTPServer):
    """Answers by path; counts requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str]] = []
        """(host header, path) of each"""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path
        self.server.requests.append((self.headers["Host"], path))
        tries = sum(path == seen for _, seen in self.server.requests)
        if path.startswith("/status/"):
            self._answer(int(path.rpartition("/")[2]))
        elif path.startswith("/passing/") and tries < 3:
            self._answer(int(path.rpartition("/")[2]), {"Retry-After": "0"})
        elif path.startswith("/to/"):
            self._answer(302, {"Location": path.removeprefix("/to/")})
        elif path == "/loop":
            self._answer(301, {"Location": "/loop"})
        elif path == "/cut" and tries < 2:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nabc")
            self.close_connection = True
        elif path == "/endless":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
            while True:
                self.wfile.write(bytes(10_000))
        elif path == "/slow-headers":
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 600:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        elif path == "/slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
            for _ in range(600):
                self.wfile.write(b"a")
                time.sleep(0.1)
        else:
            self._answer(200, body=PICTURE)

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    server.handle_error = lambda *_args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def access(site: Site, **settings: Any) -> ImageAccess:
    return ImageAccess(**{"url_hosts": (f"127.0.0.1:{site.port}",), "url_private": True, "url_timeout_s": 8} | settings)


def reason(url: str, settings: ImageAccess) -> str:
    with pytest.raises(ItemError) as error:
        read_url(url, settings, LIMITS)
    assert len(error.value.detail) <= 300
    return error.value.reason


def test_an_image_is_fetched_with_its_redirects(site: Site) -> None:
    here = f"http://127.0.0.1:{site.port}"
    settings = access(site)
    assert read_url(f"{here}/a%20b.png?x=1&y=ü#part", settings, LIMITS) == PICTURE
    assert site.requests[-1] == (f"127.0.0.1:{site.port}", "/a%20b.png?x=1&y=%C3%BC")
    assert read_url(f"{here}/to//b.png", settings, LIMITS) == PICTURE
    assert read_url(f"{here}/to/{here}/b.png", settings, LIMITS) == PICTURE
    assert reason(f"{here}/loop", settings) == "image_missing"


def test_no_host_is_reached_that_is_not_allowed(site: Site) -> None:
    here = f"http://127.0.0.1:{site.port}"
    with pytest.raises(ItemError, match=r"prepare.url_hosts") as error:
        read_url(f"{here}/a.png", ImageAccess(), LIMITS)
    assert error.value.reason == "uri_refused"
    for hosts in [("127.0.0.1",), ("*",), (f"*.0.0.1:{site.port + 1}",), (f"localhost:{site.port}",)]:
        assert reason(f"{here}/a.png", access(site, url_hosts=hosts)) == "uri_refused", "another port, another name"
    for url in (
        f"http://user:pass@127.0.0.1:{site.port}/",
        "ftp://127.0.0.1/",
        "http://",
        "http://[",
        "http://h:99999/",
    ):
        assert reason(url, access(site, url_hosts=("*", "h", f"127.0.0.1:{site.port}"))) == "uri_refused", url
    assert reason(f"{here}/to/http://example.org/a.png", access(site)) == "uri_refused", "a redirect is checked anew"
    assert [path for _, path in site.requests] == ["/to/http://example.org/a.png"]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("224.0.0.1", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::7f00:1", "2002:7f00:1::"),
    ],
)
def test_private_addresses_are_refused(address: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    answer = [(family, socket.SOCK_STREAM, 6, "", (address, site.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kw: answer)
    settings = ImageAccess(url_hosts=("*", f"*:{site.port}"), url_timeout_s=2)
    with pytest.raises(ItemError, match="not a public one") as error:
        read_url(f"http://images.example.org:{site.port}/a.png", settings, LIMITS)
    assert error.value.reason == "uri_refused" and not site.requests
    if "169.254" in address or address in ("0.0.0.0", "224.0.0.1", "fe80::1"):
        private = settings.model_copy(update={"url_private": True})
        assert reason(f"http://images.example.org:{site.port}/a.png", private) == "uri_refused", "never"


def test_the_address_that_was_checked_is_the_one_that_is_reached(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers differently the second time."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host != "images.example.org":
            return real(host, port, *args, **options)
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.9.9.9"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    settings = access(site, url_hosts=(f"*.example.org:{site.port}",))
    assert read_url(f"http://images.example.org:{site.port}/a.png", settings, LIMITS) == PICTURE
    assert asked == ["images.example.org"]
    assert site.requests == [(f"images.example.org:{site.port}", "/a.png")]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(status: int, site: Site) -> None:
    assert read_url(f"http://127.0.0.1:{site.port}/passing/{status}", access(site), LIMITS) == PICTURE
    assert len(site.requests) == 3


def test_a_broken_connection_is_tried_again(site: Site) -> None:
    assert read_url(f"http://127.0.0.1:{site.port}/cut", access(site), LIMITS) == PICTURE


@pytest.mark.parametrize("status", [404, 410])
def test_what_is_not_there_is_missing(status: int, site: Site) -> None:
    assert reason(f"http://127.0.0.1:{site.port}/status/{status}", access(site)) == "image_missing"
    assert len(site.requests) == 1


def test_bytes_are_bounded(site: Site) -> None:
    began = time.monotonic()
    assert reason(f"http://127.0.0.1:{site.port}/endless", access(site)) == "image_too_large"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", ["/slow", "/slow-headers", "/status/503"])
def test_a_host_that_is_named_must_answer_and_one_of_many_costs_its_row(
    path: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{site.port}{path}"
    began = time.monotonic()
    with pytest.raises(StorageError, match="does not answer in 2 s"):
        read_url(url, access(site, url_timeout_s=2), LIMITS)
    monkeypatch.setattr("pipelines.sources.url_reader._PORTS", {"http": site.port, "https": 443})
    assert reason(url, access(site, url_hosts=("*",), url_timeout_s=2)) == "url_unreachable"
    assert time.monotonic() - began < 10


def test_access_denied_by_a_named_host_is_no_fault_of_the_row(site: Site) -> None:
    with pytest.raises(StorageError, match="status 403; ask its owner for access") as error:
        read_url(f"http://127.0.0.1:{site.port}/status/403", access(site), LIMITS)
    assert not error.value.transient


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kw: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    began = time.monotonic()
    assert reason("https://gone.example.org/a.png", ImageAccess(url_hosts=("*",))) == "url_unreachable"
    assert time.monotonic() - began < 1, "asking again changes nothing"
    with pytest.raises(StorageError, match="cannot be resolved"):
        read_url("https://gone.example.org/a.png", ImageAccess(url_hosts=("*.example.org",), url_timeout_s=1), LIMITS)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_a_certificate_is_checked_against_the_name_of_the_host(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to an address, which no certificate names."""
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    names = ["-subj", "/CN=images.example.org", "-addext", "subjectAltName=DNS:images.example.org"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-keyout",
        key,
        "-out",
        certificate,
    ]
    subprocess.run([*command, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", site.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kw: here)
    settings = access(site, url_hosts=(f"*.example.org:{site.port}",), url_timeout_s=2)
    with pytest.raises(StorageError, match="SSLError"):
        read_url(f"https://images.example.org:{site.port}/a.png", settings, LIMITS)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    _pool.cache_clear()
    assert read_url(f"https://images.example.org:{site.port}/a.png", settings, LIMITS) == PICTURE
    with pytest.raises(StorageError, match="SSLError"):
        read_url(f"https://other.example.org:{site.port}/a.png", settings, LIMITS)
    _pool.cache_clear()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="without http://"):
        ImageAccess(url_hosts=("http://example.org",))
