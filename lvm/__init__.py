"""LVM Serve for callers: `Client`, `AsyncClient` and the errors that they raise.

The server imports `lvm.errors` only, so the client is imported on first access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvm.client import AsyncClient, Client
    from lvm.errors import ServiceError

__all__ = ["AsyncClient", "Client", "ServiceError"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lvm import client

    return getattr(client, name)
