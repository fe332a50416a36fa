"""The sockets of the client: every wait ends at the deadline of the call, and a proxy is used only if needed.

httpx limits each single wait for the network, so a server that sends one byte at a time can delay a caller without
limit. The synchronous client therefore uses this backend of httpcore. asyncio can cancel a call by itself.
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

# A longer timeout means no limit: the operating system cannot represent it.
MAX_TIMEOUT_S = 1e6
# bytes of one write, so that the deadline is checked in between
WRITE_BYTES = 16_384
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=5.0)
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


@contextmanager
def deadline_at(deadline: float) -> Iterator[None]:
    """Set the deadline, in monotonic seconds, of this thread's requests on a `Transport`."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def proxy_of(url: httpx.URL) -> httpx.Proxy | None:
    """Return the proxy that the environment names for a URL; None for addresses of this machine.

    Raises:
        ValueError: the proxy of the environment is not a URL.
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
        raise ValueError(f"the proxy of the environment for {url.scheme} is invalid: {error}") from error


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


class Transport(httpx.BaseTransport):
    """An httpx transport over a connection pool of httpcore, whose sockets keep the deadline of `deadline_at`."""

    def __init__(self, proxy: httpx.Proxy | None) -> None:
        self._pool = _pool(proxy)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises the errors of httpcore."""
        url = request.url
        where = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = httpcore.Request(
            request.method, where, headers=request.headers.raw, content=request.read(), extensions=request.extensions
        )
        response = self._pool.handle_request(sent)
        parts = _ResponseStream(response)
        return httpx.Response(response.status, headers=response.headers, stream=parts, extensions=response.extensions)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class _ResponseStream(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._answer = response

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


def _seconds_left(late: type[Exception]) -> float | None:
    """Return the seconds until the deadline, None if there is no limit; raises `late` if it has passed."""
    left = _deadline.get() - monotonic()
    if left <= 0:
        raise late("the deadline passed")
    return left if left < MAX_TIMEOUT_S else None


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
        addresses = _resolve(host, port)
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        for at, address in enumerate(addresses):
            left = _seconds_left(httpcore.ConnectTimeout)
            share = None if left is None else left / (len(addresses) - at)
            try:
                return _Stream(self._sockets.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed

    def sleep(self, seconds: float) -> None:
        sleep(seconds)


def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, resolved in a thread, since a resolver that hangs cannot be cancelled."""
    found: SimpleQueue[list[str] | Exception] = SimpleQueue()

    def resolve() -> None:
        try:
            known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put(list(dict.fromkeys(str(address[0]) for *_, address in known)))
        except Exception as error:
            found.put(error)

    Thread(target=resolve, daemon=True, name="lvm-resolve").start()
    try:
        addresses = found.get(timeout=_seconds_left(httpcore.ConnectTimeout))
    except Empty:
        raise httpcore.ConnectTimeout(f"the name {host} was not resolved in time") from None
    if isinstance(addresses, Exception):
        raise httpcore.ConnectError(str(addresses)) from addresses
    return addresses


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _seconds_left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for at in range(0, len(buffer), WRITE_BYTES):
            self._inner.write(buffer[at : at + WRITE_BYTES], _seconds_left(httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, _seconds_left(httpcore.ConnectTimeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
