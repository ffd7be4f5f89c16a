"""Images at ``http(s)`` URLs, only from hosts that the configuration allows.

A row must not reach into the network of the machine that reads it: a host is resolved once, the connection goes to the
address that was checked (a second answer of the name server changes nothing), and every redirect is checked anew.
Private, loopback, link-local, multicast and reserved addresses are refused, also where an IPv6 address wraps them.
Proxies of the environment are not used: they would resolve the name again. Bytes and time are bounded.

404 and 410 mean that the image is not there. 429, 5xx, time-outs and broken connections are tried again with growing
pauses. If they stay, a host that the configuration names is infrastructure, and the job fails; a host that only ``*``
allows is one of the corpus's millions, and costs its row (``url_unreachable``).
"""

from __future__ import annotations

import ipaddress
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3
import urllib3.connection

from crem.config import ImageAccess, ImageConfig
from crem.data.image_bytes import too_many_bytes
from crem.errors import ItemError, StorageError, shortened

__all__ = ["read_url"]

log = logging.getLogger(__name__)

_MAX_REDIRECTS = 5
_CHUNK = 1 << 16
_ANSWER_TIMEOUT_S = 10.0
"""For a connection, and between two pieces of an answer."""
_LONGEST_PAUSE_S = 8.0
_UNNAMED_TIMEOUT_S = 15.0
"""Bound on ``url_timeout_s`` for a host that only ``*`` allows: of millions many are gone."""
_PORTS = {"http": 80, "https": 443}
_HEADERS = {
    "User-Agent": "crem-prepare (image corpus reader)",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",
}
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_ABSENT_STATUS = frozenset({400, 404, 405, 406, 410, 414, 415})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class _PassingError(Exception):
    """A failure that another attempt may not meet.

    Attributes:
        pause_s: what the server asks for.
        is_final: whether the name server says that there is no such host.
    """

    def __init__(self, message: str, pause_s: float = 0.0, *, is_final: bool = False):
        super().__init__(message)
        self.pause_s, self.is_final = pause_s, is_final


@dataclass(frozen=True)
class _Target:
    """A URL that may be fetched, and the address to fetch it from."""

    scheme: str
    host: str
    port: int
    path: str
    address: str


def read_url(url: str, access: ImageAccess, limits: ImageConfig) -> bytes:
    """The bytes at a URL.

    Raises:
        ItemError: ``uri_refused``, ``image_missing``, ``image_too_large``, ``url_unreachable`` (of a host that only
            ``*`` allows).
        StorageError: a host that is named in ``url_hosts`` does not answer in ``url_timeout_s``, or denies access.
    """
    timeout_s = access.url_timeout_s if _is_named(url, access) else min(access.url_timeout_s, _UNNAMED_TIMEOUT_S)
    deadline, pause_s = time.monotonic() + timeout_s, 0.5
    while True:
        try:
            return _fetch(url, access, limits, deadline)
        except _PassingError as error:
            wait = max(error.pause_s, pause_s * random.uniform(0.8, 1.2))
            if time.monotonic() + wait >= deadline or (error.is_final and not _is_named(url, access)):
                told = f"does not answer in {timeout_s:.0f} s: {shortened(str(error), 90)}"
                raise _failure(url, f"{shortened(url, 120)!r} {told}", access, transient=True) from error
            log.info("%s: %s; trying again in %.1f s", shortened(url), error, wait)
            time.sleep(wait)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)


def _fetch(url: str, access: ImageAccess, limits: ImageConfig, deadline: float) -> bytes:
    """One attempt, with its redirects."""
    for _ in range(_MAX_REDIRECTS + 1):
        target = _target(url, access)
        with _cut_at(deadline):
            try:
                response = _pool(target.scheme, target.host, target.port, target.address).urlopen(
                    "GET",
                    target.path,
                    headers={**_HEADERS, "Host": _host_header(target)},
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=urllib3.Timeout(connect=_ANSWER_TIMEOUT_S, read=_ANSWER_TIMEOUT_S),
                    assert_same_host=False,
                )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise _PassingError(f"{type(error).__name__}: {error}") from error
            try:
                location = response.headers.get("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = urljoin(url, location)
                    continue
                _check_status(url, response, access)
                return _body(response, limits, deadline)
            finally:
                response.close()
    raise ItemError("image_missing", f"{shortened(url)!r} redirects more than {_MAX_REDIRECTS} times")


def _check_status(url: str, response: urllib3.BaseHTTPResponse, access: ImageAccess) -> None:
    status = response.status
    if 200 <= status < 300:
        return
    if status in _PASSING_STATUS:
        asked = response.headers.get("Retry-After", "")
        raise _PassingError(f"status {status}", float(asked) if asked.isdigit() else 0.0)
    if status in _ABSENT_STATUS:
        raise ItemError("image_missing", f"{shortened(url)!r} answers with status {status}")
    told = f"{shortened(url, 160)!r} answers with status {status}; ask its owner for access, or drop the row"
    raise _failure(url, told, access, transient=False)


def _body(response: urllib3.BaseHTTPResponse, limits: ImageConfig, deadline: float) -> bytes:
    data = bytearray()
    try:
        while piece := response.read1(_CHUNK):
            data += piece
            if len(data) > limits.max_source_bytes:
                raise too_many_bytes(len(data), limits)
            if time.monotonic() >= deadline:
                break
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _PassingError(f"{type(error).__name__}: {error}") from error
    if time.monotonic() >= deadline:  # a connection that was cut looks like a complete answer
        raise _PassingError(f"{len(data)} bytes arrived in the time allowed")
    return bytes(data)


def _failure(url: str, told: str, access: ImageAccess, *, transient: bool) -> ItemError | StorageError:
    return StorageError(told, transient) if _is_named(url, access) else ItemError("url_unreachable", told)


def _is_named(url: str, access: ImageAccess) -> bool:
    """Whether a host is allowed by its name, and not by ``*`` alone."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    return any(_matches(p, host, port, parts.scheme) for p in access.url_hosts if p.partition(":")[0] != "*")


def _target(url: str, access: ImageAccess) -> _Target:
    """Check a URL, and resolve its host to an address that may be reached."""
    shown = shortened(url, 120)
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), (parts.hostname or "").rstrip("."), parts.port
        host = host.encode("idna").decode() if not host.isascii() else host
    except ValueError as error:
        raise ItemError("uri_refused", f"{shown!r} is not a URL: {error}") from error
    if scheme not in _PORTS or not host or parts.username is not None:
        raise ItemError("uri_refused", f"{shown!r} is not a plain http(s) URL; only those are fetched")
    if not any(_matches(pattern, host, port, scheme) for pattern in access.url_hosts):
        raise ItemError(
            "uri_refused",
            f"{shown!r}: images of {shortened(host, 60)} are not fetched; allow it with prepare.url_hosts=[…] "
            "(crem embed: embed.url_hosts), or download them",
        )
    port = port or _PORTS[scheme]
    path = urllib3.util.parse_url(parts._replace(scheme="http", netloc="h", fragment="").geturl()).request_uri
    return _Target(scheme, host, port, path, _address(host, port, access.url_private))


def _matches(pattern: str, host: str, port: int | None, scheme: str) -> bool:
    """``*`` and a pattern without a port allow the default port only."""
    name, _, wanted = (
        pattern.lower().rpartition(":") if pattern.rpartition(":")[2].isdigit() else (pattern.lower(), "", "")
    )
    allowed_port = int(wanted) if wanted else _PORTS.get(scheme)
    if (port or _PORTS.get(scheme)) != allowed_port:
        return False
    host = host.lower()
    return name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))


def _address(host: str, port: int, private: bool) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        unknown = error.errno == socket.EAI_NONAME
        raise _PassingError(f"the name {host} cannot be resolved: {error}", is_final=unknown) from error
    except UnicodeError as error:
        raise ItemError("uri_refused", f"{shortened(host)!r} is not the name of a host") from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for address in addresses:
        if _may_reach(ipaddress.ip_address(address), private):
            return address
    raise ItemError(
        "uri_refused",
        f"{shortened(host, 100)} has the address {addresses[0] if addresses else 'none'}, which is not a public one; "
        "images of a private network need prepare.url_private=true",
    )


def _may_reach(address: Address, private: bool) -> bool:
    wrapped = None
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if wrapped is None and address in ipaddress.ip_network("64:ff9b::/96"):
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if wrapped is not None:
        return _may_reach(wrapped, private)
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    return address.is_global or (private and (address.is_private or address.is_loopback))


def _host_header(target: _Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == _PORTS[target.scheme] else f"{host}:{target.port}"


class _WatchedConnection(urllib3.connection.HTTPConnection):
    """Tells ``_cut_at`` which connection this thread waits for."""

    def request(self, *args: Any, **options: Any) -> None:
        _waiting.connection = self
        super().request(*args, **options)


class _WatchedTlsConnection(urllib3.connection.HTTPSConnection):
    """As ``_WatchedConnection``."""

    def request(self, *args: Any, **options: Any) -> None:
        _waiting.connection = self
        super().request(*args, **options)


_waiting = threading.local()


@contextmanager
def _cut_at(deadline: float) -> Iterator[None]:
    """Close this thread's connection at a moment. A time-out alone ends no answer of a byte every few seconds."""
    _waiting.connection = None
    waiting = _waiting.__dict__  # of this thread

    def cut() -> None:
        sock = getattr(waiting.get("connection"), "sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@lru_cache(maxsize=64)
def _pool(scheme: str, host: str, port: int, address: str) -> urllib3.HTTPConnectionPool:
    """Connections to one address, which are kept open; a certificate is checked against the name of the host."""
    pool: urllib3.HTTPConnectionPool
    if scheme == "http":
        pool = urllib3.HTTPConnectionPool(address, port, maxsize=4)
        pool.ConnectionCls = _WatchedConnection
        return pool
    pool = urllib3.HTTPSConnectionPool(
        address, port, maxsize=4, cert_reqs="CERT_REQUIRED", server_hostname=host, assert_hostname=host
    )
    pool.ConnectionCls = _WatchedTlsConnection
    return pool
