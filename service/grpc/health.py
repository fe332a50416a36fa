"""The standard health service and reflection: grpc's own servicers, as handlers of the gateway, which counts calls."""

from __future__ import annotations

import asyncio

from grpc.aio import EOF, AbortError
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection import aio as reflection

from lvm.errors import Malformed
from service.grpc.call import Call
from service.grpc.messages import HEALTH, POOL, REFLECTION, SERVICE, parse
from service.http.messages import Request, Response


class Health:
    """Whether the service is ready, for grpc.health.v1: of the server as a whole, and by the name of the service."""

    def __init__(self) -> None:
        self._servicer = health.HealthServicer()
        self._is_ready: bool | None = None
        self._changes: set[asyncio.Task[None]] = set()

    def set_ready(self, is_ready: bool) -> None:
        """Answer whether it is ready from now on, also to those who watch."""
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            change = asyncio.create_task(self._set(HealthCheckResponse.SERVING if is_ready else NOT_SERVING))
            self._changes.add(change)
            change.add_done_callback(self._changes.discard)

    async def _set(self, status: int) -> None:
        for name in ("", SERVICE):
            await self._servicer.set(name, status)

    async def check(self, request: Request) -> Response:
        """Answer Check."""
        await request.read()
        asked = parse(HealthCheckRequest, request.body)
        try:
            found = await self._servicer.Check(asked, _call(request).context)
        except AbortError:
            return Response(b"", b"", [], 404, "unknown_service")
        return Response(found.SerializeToString(), b"", [])

    async def watch(self, request: Request) -> Response:
        """Answer Watch, until the client leaves."""
        context = _call(request).context
        asked = await context.read()
        if asked is EOF:
            raise Malformed("the call has no message")
        await self._servicer.Watch(asked, context)
        return Response(b"", b"", [])


class Reflection:
    """Answers ServerReflectionInfo: what services there are, and their messages."""

    def __init__(self) -> None:
        self._servicer = reflection.ReflectionServicer((SERVICE, HEALTH, REFLECTION), POOL)

    async def __call__(self, request: Request) -> Response:
        """Answer until the client leaves."""
        call = _call(request)
        async for reply in self._servicer.ServerReflectionInfo(call.messages, call.context):
            await call.context.write(reply)
        return Response(b"", b"", [])


NOT_SERVING = HealthCheckResponse.NOT_SERVING


def _call(request: Request) -> Call:
    assert isinstance(request, Call)
    return request
