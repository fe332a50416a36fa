"""Listening sockets: bind one, lock its address, check who can reach it, and stop accepting."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from service.http.auth import Tokens
from service.telemetry.log import logger

# Of the device worker, in the directory of the shared-memory metrics, which no other user can read.
DEVICE_SOCKET = "owner.sock"
# Missing in the socket module.
SO_ATTACH_FILTER = 26


class CannotListen(Exception):
    """The address is invalid or in use, or other machines reach it although no token is set."""


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a bound socket that does not listen yet. If `shared`, other sockets of ours may be bound there too.

    Raises:
        CannotListen: The address is invalid or in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def urls(host: str, port: int) -> dict[str, str]:
    """Return the URLs of the service, of its console and of its documentation, for the log."""
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return {"url": url, "console": f"{url}/", "docs": f"{url}/docs"}


def lock_address(listener: socket.socket) -> socket.socket:
    """Return a socket that keeps other services from the address of `listener` while it is open.

    The kernel lets a second service bind an address if nothing listens there yet, or if workers share it. The lock is
    an abstract Unix socket, which Linux removes with its process and which is visible where the address is.

    Raises:
        CannotListen: Another service holds the lock.
    """
    host, port = listener.getsockname()[:2]
    lock = socket.socket(socket.AF_UNIX)
    try:
        if sys.platform == "linux":
            lock.bind(f"\0lvm {host} {port}")
    except OSError as error:
        lock.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return lock


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Keep an address, at which only sockets that share their port can listen, from other services; yield its port.

    Raises:
        CannotListen: The address is invalid or in use.
    """
    # Fails if any process listens there, also one that shares its port.
    with bind(host, port) as unshared:
        port = unshared.getsockname()[1]
        lock = lock_address(unshared)
    with lock, bind(host, port, shared=True):
        yield port


def check_exposure(address: str, tokens: Tokens, *, insecure: bool) -> None:
    """Reject an address that other machines reach if no token is set, unless `insecure`.

    Raises:
        CannotListen: Anyone could call.
    """
    if len(tokens) or ip_address(address).is_loopback:
        return
    if not insecure:
        raise CannotListen(
            f"refusing to listen on {address}: other machines reach it, and no token is set. Set LVM_TOKENS or "
            "LVM_TOKENS_FILE, or listen on 127.0.0.1, or pass --insecure (LVM_INSECURE=true) if the network is closed"
        )
    logger().warning("insecure", address=address, detail="no token is set: anyone who reaches this address may call")


def stop_accepting(listener: socket.socket) -> None:
    """Make the kernel drop new connections, so that closing the socket resets none that is established.

    The socket filter has one instruction, "keep 0 bytes". Only Linux has it; elsewhere a late caller may be reset.

    Raises:
        OSError: The kernel does not allow it.
    """
    if sys.platform == "linux":
        # BPF_RET | BPF_K, 0
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
        program = struct.pack("HL", 1, ctypes.addressof(instruction))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
