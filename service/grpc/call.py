"""A remote call as a request of the gateway, and the gateway's response as the answer to the call."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any
from urllib.parse import unquote

from grpc import StatusCode
from grpc.aio import EOF

from lvm.errors import Malformed, ServiceError, TooSlow
from service.grpc.status import code_of, trailing_metadata
from service.http.gateway import Gateway
from service.http.headers import combine
from service.http.messages import Request

# Metadata that mean what the headers of these names mean.
KNOWN = frozenset(
    {"authorization", "x-request-id", "x-request-timeout-ms", "x-live-score", "traceparent", "tracestate"}
)
# grpc ends a call whose message is too long, or whose client is gone, so soon after it has ended the messages.
END_S = 0.1


class Call(Request):
    """A call whose message is read when the gateway has admitted it.

    Args:
        path: of the method, as /inference.GRPCInferenceService/ModelInfer.
        context: grpc's; its messages are bytes, unless the method is a stream.
        receive_s: longest time in which the message must arrive, in seconds.
        messages: the iterator of a stream.
    """

    is_ready = False

    def __init__(self, path: str, context: Any, receive_s: float, messages: Any = None) -> None:
        given = [(key.encode(), value.encode()) for key, value in context.invocation_metadata() if key in KNOWN]
        super().__init__(b"POST", path, b"", combine(given) if given else {}, client_of(context.peer()))
        self.context = context
        self.messages = messages
        self._receive_s = receive_s
        self._task = asyncio.current_task()
        remaining = context.time_remaining()
        if remaining is not None:
            self.until = monotonic() + remaining

    async def read(self) -> None:
        """Wait for the message; raises `TooSlow`, `Malformed`, and as `Request.add`."""
        try:
            async with asyncio.timeout(self._receive_s):
                message = await self.context.read()
        except TimeoutError:
            raise TooSlow("the message did not arrive in time") from None
        if message is EOF:
            await asyncio.sleep(END_S)
            raise Malformed("the call has no message")
        self.add(message)
        self.is_ready = True

    def fail(self, error: ServiceError) -> None:
        """Have the call answered with `error` now."""
        self.failure = error
        if self._task is not None:
            self._task.cancel()

    async def answer(self, gateway: Gateway) -> bytes:
        """Return the gateway's answer; an error ends the call, with its status."""
        response = await gateway.handle(self)
        if self.context.done():
            return b""
        metadata = trailing_metadata(response)
        code = code_of(response)
        if code is not StatusCode.OK:
            await self.context.abort(code, response.body.decode(), metadata)
        self.context.set_trailing_metadata(metadata)
        return response.body


def client_of(peer: str) -> str:
    """Return the address of a peer, `ipv4:127.0.0.1:1` or `ipv6:%5B::1%5D:1`, as HTTP has it."""
    address = unquote(peer).partition(":")[2]
    return address.rpartition(":")[0].strip("[]")
