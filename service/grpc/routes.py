"""The methods of the service as routes of a gateway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lvm.errors import ServiceError
from service.deploy.deployments import Deployments
from service.deploy.shadow import Shadow
from service.engines.router import Router
from service.grpc.health import Health, Reflection
from service.grpc.infer import ModelInfer
from service.grpc.messages import HEALTH, REFLECTION, SERVICE, message_type, parse
from service.grpc.status import UNKNOWN_ROUTE
from service.http.gateway import OTHER, Route, State
from service.http.messages import Handler, Request, Response
from service.http.routes import oip
from service.http.routes.health import check_live, check_ready
from service.overload.fairness import Slicer
from service.settings import Settings

INFER = "grpc:infer"
# In bytes, of the messages of all methods but ModelInfer.
MAX_SHORT = 2**16
EXTENSIONS = ("model_configuration", "model_repository")
# What to use instead of methods of Triton, by a part of their names.
MISSING: Mapping[str, str] = {
    "ModelStreamInfer": "there are no streams: send ModelInfer for each context, or many contexts in one",
    "Statistics": "there is no statistics extension: GET /metrics counts and times all requests",
    "TraceSetting": "there is no trace extension: LVM_OTLP_ENDPOINT and LVM_TRACE_SHARE are set at start",
    "LogSettings": "there is no logging extension: LVM_LOG_LEVEL is set at start",
    "SharedMemory": "there is no shared memory extension: send tensors in the message",
    "RepositoryModel": "models are loaded by the registry: lvm promote, lvm rollback",
}
UNKNOWN = f"unknown method; reflection lists those of {SERVICE}"


class Parts(NamedTuple):
    """What the methods need of the service."""

    router: Router
    deployments: Deployments
    shadow: Shadow
    state: State
    settings: Settings
    slicer: Slicer
    version: str


def routes(parts: Parts, health: Health) -> dict[str, Route]:
    """Return the route of each method, by its path."""
    settings = parts.settings
    max_body = round(settings.max_body_mb * 1e6)
    infer = ModelInfer(parts.router, parts.shadow, settings, parts.slicer)
    found = {f"/{SERVICE}/ModelInfer": Route(INFER, infer, max_body, is_admitted=True)}
    for name, (label, answer, is_open) in _methods(parts).items():
        handler = _unary(message_type(f"{name}Request"), message_type(f"{name}Response"), answer)
        found[f"/{SERVICE}/{name}"] = Route(f"grpc:{label}", handler, MAX_SHORT, is_open=is_open, is_logged=not is_open)
    for name, handler in (("Check", health.check), ("Watch", health.watch)):
        found[f"/{HEALTH}/{name}"] = Route("grpc:health", handler, MAX_SHORT, is_open=True, is_logged=False)
    found[f"/{REFLECTION}/ServerReflectionInfo"] = Route("grpc:reflection", Reflection(), MAX_SHORT)
    return found


class Method(NamedTuple):
    """The label of a method in metrics, what maps its request to its response, and whether it needs no token."""

    label: str
    answer: Callable[[Any], dict[str, Any]]
    is_open: bool = False


def _methods(parts: Parts) -> dict[str, Method]:
    """Return the methods that are answered at once, by name."""
    router = parts.router

    def of_model(describe: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        return lambda asked: describe(oip.chain_of(router, asked.name, asked.version or None)[0])

    def config(engine: Any) -> dict[str, Any]:
        return {"config": oip.model_config(engine, parts.settings.max_rows)}

    def model_ready(asked: Any) -> dict[str, Any]:
        return {"ready": _holds(oip.chain_of, router, asked.name, asked.version or None)}

    server = {"name": "lvm-serve", "version": parts.version, "extensions": EXTENSIONS}
    return {
        "ServerLive": Method(
            "server_live", lambda _: {"live": _holds(check_live, parts.deployments, parts.settings)}, is_open=True
        ),
        "ServerReady": Method(
            "server_ready", lambda _: {"ready": _holds(check_ready, parts.deployments, parts.state)}, is_open=True
        ),
        "ModelReady": Method("model_ready", model_ready),
        "ServerMetadata": Method("server_metadata", lambda _: server),
        "ModelMetadata": Method("model_metadata", of_model(oip.model_metadata)),
        "ModelConfig": Method("model_config", of_model(config)),
        "RepositoryIndex": Method("repository_index", lambda _: {"models": oip.repository_index_of(router)}),
    }


def _holds(check: Callable[..., object], *arguments: Any) -> bool:
    """Return whether a check passes."""
    try:
        check(*arguments)
    except ServiceError:
        return False
    return True


def _unary(request_type: Any, response_type: Any, answer: Callable[[Any], dict[str, Any]]) -> Handler:
    async def handler(request: Request) -> Response:
        await request.read()
        message = response_type(**answer(parse(request_type, request.body)))
        return Response(message.SerializeToString(), b"", [])

    return handler


async def _unknown(request: Request) -> Response:
    method = request.path.rpartition("/")[2]
    instead = next((text for part, text in MISSING.items() if part in method), UNKNOWN)
    return Response(instead.encode(), b"", [(b"x-reason", UNKNOWN_ROUTE.encode())], 404, UNKNOWN_ROUTE)


UNKNOWN_METHOD = Route(OTHER, _unknown, MAX_SHORT)
