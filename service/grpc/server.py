"""The gRPC server of a process, on the event loop of its HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from lvm.errors import Draining
from service.grpc.call import Call
from service.grpc.health import Health
from service.grpc.messages import HEALTH, REFLECTION
from service.http.gateway import Gateway
from service.settings import Settings

# Methods that last until their client leaves, and the messages that grpc's servicers read and write there.
STREAMS: Mapping[str, tuple[Any, Any]] = {
    f"/{HEALTH}/Watch": (HealthCheckRequest, HealthCheckResponse),
    f"/{REFLECTION}/ServerReflectionInfo": (ServerReflectionRequest, ServerReflectionResponse),
}
MAX_METADATA = 2**14
# Of one connection; further calls wait in the client.
MAX_STREAMS = 1024
# Servers at the port, among which the kernel divides connections. grpc takes one call after the other from a server,
# over several turns of the event loop; one server would fill no batches.
SERVERS = 8
# Clients may ping this often to keep a connection open; grpc's default is 5 minutes.
PING_MS = 5_000


class GrpcServer:
    """Answers remote calls by a gateway; also a `grpc.GenericRpcHandler`, which names the handler of each method.

    Args:
        gateway: its routes are the paths of methods.
        health: what the health service answers.
        is_ready: whether calls should come here.
    """

    def __init__(self, gateway: Gateway, health: Health, is_ready: Callable[[], bool], settings: Settings) -> None:
        self._gateway = gateway
        self._health = health
        self._is_ready = is_ready
        self._settings = settings
        self._calls: set[Call] = set()
        self._servers: list[Any] = []
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen; the kernel divides connections among the processes that listen there.

        Raises:
            RuntimeError: the address is in use.
        """
        self.update()
        address = f"[{host}]" if ":" in host else host
        for _ in range(SERVERS):
            server = grpc.aio.server(options=_options(self._settings))
            server.add_generic_rpc_handlers((self,))
            self.port = server.add_insecure_port(f"{address}:{self.port or port}")
            await server.start()
            self._servers.append(server)

    def update(self) -> None:
        """Have the health service answer what is true now."""
        self._health.set_ready(self._is_ready())

    async def stop(self, grace_s: float) -> None:
        """Accept no calls, end streams, and finish the other calls; after `grace_s` seconds they are rejected."""
        self.update()
        stopping = asyncio.gather(*(server.stop(grace_s + 1) for server in self._servers))
        self._fail([call for call in self._calls if call.path in STREAMS])
        await asyncio.wait((stopping,), timeout=grace_s)
        self._fail(list(self._calls))
        await stopping

    def _fail(self, calls: list[Call]) -> None:
        for call in calls:
            call.fail(Draining("the server is shutting down"))

    def service(self, details: Any) -> Any:
        """Return the handler of a method."""
        path = details.method
        if path in STREAMS:
            asked, answered = STREAMS[path]
            return grpc.stream_stream_rpc_method_handler(
                self._handler(path), asked.FromString, answered.SerializeToString
            )
        # A stream of one message looks the same to the client, and leaves it to the gateway when to read the message.
        return grpc.stream_unary_rpc_method_handler(self._handler(path))

    def _handler(self, path: str) -> Callable[[Any, Any], Awaitable[bytes]]:
        async def answer(messages: Any, context: Any) -> bytes:
            call = Call(path, context, self._settings.receive_s, messages)
            self._calls.add(call)
            try:
                return await call.answer(self._gateway)
            finally:
                self._calls.discard(call)

        return answer


def _options(settings: Settings) -> list[tuple[str, int]]:
    """Return what grpc's server is told."""
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", round(settings.max_body_mb * 1e6)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", round(settings.receive_s * 1000)),
        ("grpc.max_connection_idle_ms", round(settings.keep_alive_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # Without it a call that waits for its turn may receive megabytes that nothing counts.
        ("grpc.http2.bdp_probe", 0),
    ]
