"""The sockets of the client: every wait ends at the call's deadline, and a proxy is used only if one is needed.

httpx limits each wait for the network, so a server that sends one byte at a time can hold a caller without end. The
synchronous client therefore runs on this backend of httpcore; asyncio cancels a call by itself.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic, sleep
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

LONGEST_S = 1e6  # a longer timeout means no limit: the operating system cannot represent it
SLICE = 16_384  # bytes that a socket takes at once if it takes any
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=5.0)
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Hold what this thread does on a `Transport` to a deadline, in monotonic seconds."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def proxy_of(url: httpx.URL) -> httpx.Proxy | None:
    """Return the proxy that the environment names for a URL; none leads to the machine itself.

    Raises:
        ValueError: the environment names one that is no URL.
    """
    if _is_local(url.host) or proxy_bypass(url.host):
        return None
    known = getproxies()
    proxy = known.get(url.scheme) or known.get("all")
    if not proxy:
        return None
    try:
        return httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"the proxy of the environment for {url.scheme} is not usable: {error}") from error


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


class Transport(httpx.BaseTransport):
    """httpx over the pool of httpcore, with sockets that keep the deadline of `until`."""

    def __init__(self, proxy: httpx.Proxy | None) -> None:
        self._pool = _pool(proxy)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; errors leave as httpcore's."""
        url = request.url
        where = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        asked = httpcore.Request(
            request.method, where, headers=request.headers.raw, content=request.read(), extensions=request.extensions
        )
        answer = self._pool.handle_request(asked)
        parts = _Parts(answer)
        return httpx.Response(answer.status, headers=answer.headers, stream=parts, extensions=answer.extensions)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class _Parts(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


def _pool(proxy: httpx.Proxy | None) -> httpcore.ConnectionPool:
    common: dict[str, Any] = {
        "ssl_context": httpx.create_ssl_context(),
        "max_connections": LIMITS.max_connections,
        "max_keepalive_connections": LIMITS.max_keepalive_connections,
        "keepalive_expiry": LIMITS.keepalive_expiry,
        "network_backend": _Backend(),
    }
    if proxy is None:
        return httpcore.ConnectionPool(**common)
    known = {"proxy_url": str(proxy.url), "proxy_auth": proxy.raw_auth, **common}
    if proxy.url.scheme in ("http", "https"):
        return httpcore.HTTPProxy(proxy_headers=proxy.headers.raw, **known)
    return httpcore.SOCKSProxy(**known)


def _left(late: type[Exception]) -> float | None:
    """Return the seconds that are left, None if there is no limit; raises `late` if there are none."""
    left = _deadline.get() - monotonic()
    if left <= 0:
        raise late("the deadline passed")
    return left if left < LONGEST_S else None


class _Backend(httpcore.NetworkBackend):
    def __init__(self) -> None:
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _addresses(host, port)
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        for at, address in enumerate(addresses):
            left = _left(httpcore.ConnectTimeout)
            share = None if left is None else left / (len(addresses) - at)
            try:
                return _Stream(self._sockets.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed

    def sleep(self, seconds: float) -> None:
        sleep(seconds)


def _addresses(host: str, port: int) -> list[str]:
    """Return the addresses of a host; in a thread of its own, as nothing ends a resolver that does not answer."""
    found: SimpleQueue[list[str] | Exception] = SimpleQueue()

    def resolve() -> None:
        try:
            known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put(list(dict.fromkeys(str(address[0]) for *_, address in known)))
        except Exception as error:
            found.put(error)

    Thread(target=resolve, daemon=True, name="lvm-resolve").start()
    try:
        addresses = found.get(timeout=_left(httpcore.ConnectTimeout))
    except Empty:
        raise httpcore.ConnectTimeout(f"the name {host} was not resolved in time") from None
    if isinstance(addresses, Exception):
        raise httpcore.ConnectError(str(addresses)) from addresses
    return addresses


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for at in range(0, len(buffer), SLICE):
            self._inner.write(buffer[at : at + SLICE], _left(httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, _left(httpcore.ConnectTimeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
