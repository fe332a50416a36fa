"""The graph: what is deployed, and within which bounds; and serving it until a signal to stop."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from pydantic import SecretStr
from ray import serve

from models.registry.alias import PREDICTORS, Alias
from models.registry.registry import Registry, UnknownVersion
from models.registry.remote import is_url
from service.http.auth import read_tokens
from service.processes.sockets import bind, check_exposure, urls
from service.ray.ingress import Ingress
from service.ray.node_metrics import metrics_home
from service.ray.replica import Replica
from service.settings import BadSettings, Settings, read_settings
from service.telemetry.log import configure, logger

APP = "lvm"
BY_WAIT = "service.ray.scaling:QueueWait"


def build(settings: Settings, least: int = 1, target_s: float = 0.02, per_node: int | None = None) -> serve.Application:
    """Return the graph: the ingress, and a deployment for every alias that is set.

    Each has `least` replicas, and up to `workers` if requests wait longer than `target_s` seconds; at most `per_node`
    on a node. Without that bound Ray may put all replicas of an alias on one node, which may die.

    Raises:
        BadSettings: the registry is no directory, or there is a port for gRPC.
    """
    if settings.grpc_port is not None:
        raise BadSettings("LVM_GRPC_PORT: gRPC works without --ray only, as with `lvm serve --workers N`")
    if is_url(settings.registry):
        raise BadSettings("LVM_REGISTRY: on a cluster, a directory that every node sees; mount the store there")
    root = Path(settings.registry).resolve()
    settings = settings.model_copy(update={"registry": str(root)})
    secretless = {"tokens": SecretStr(""), "tokens_file": None, "encoder": "none"}
    share = {} if "threads" in settings.model_fields_set else {"threads": 1}
    theirs = settings.model_copy(update={**secretless, **share})
    registry = Registry(root)
    aliases = [alias for alias in (*PREDICTORS, Alias.RETRIEVER) if _is_set(registry, alias)]
    scaled = {"min_replicas": least, "max_replicas": max(least, settings.workers), "upscale_delay_s": 5}
    by_wait = scaled | {"policy": {"policy_function": BY_WAIT, "policy_kwargs": {"target_s": target_s}}}
    placed = {"max_replicas_per_node": per_node, "ray_actor_options": {"num_cpus": 0.25}}
    graph = {alias: _deployment(alias, theirs, by_wait, placed).bind(alias, theirs) for alias in aliases}
    return _ingress(settings, scaled, placed).bind(settings, graph)


def _is_set(registry: Registry, alias: str) -> bool:
    with suppress(UnknownVersion):
        return bool(registry.resolve(alias))
    return False


def _deployment(alias: str, settings: Settings, scaled: dict[str, Any], placed: dict[str, Any]) -> Any:
    return serve.deployment(Replica).options(
        name=alias,
        autoscaling_config=scaled,
        max_ongoing_requests=2 * settings.max_batch,  # one batch runs, one gathers
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.grace_s,
        health_check_period_s=1,
        **placed,
    )


def _ingress(settings: Settings, scaled: dict[str, Any], placed: dict[str, Any]) -> Any:
    return serve.deployment(Ingress).options(
        name="ingress",
        autoscaling_config=scaled | {"target_ongoing_requests": settings.max_batch},
        max_ongoing_requests=4 * settings.max_queue,  # the app itself rejects excess load
        graceful_shutdown_timeout_s=settings.drain_s + settings.grace_s,
        health_check_period_s=1,
        **placed,
    )


def app(arguments: dict[str, Any]) -> serve.Application:
    """Return the graph for a Serve config file, whose `args` are settings by name, the environment's below them."""
    return build(read_settings(**arguments))


def serve_until_signal(settings: Settings) -> int:
    """Serve on the cluster that RAY_ADDRESS names, or on one of this machine, until SIGTERM or SIGINT.

    Raises:
        BadSettings: the tokens cannot be read.
        CannotListen: the address is taken, or may not be listened on without a token.
    """
    configure(settings.log_level)
    with bind(settings.host, settings.port) as probe:
        check_exposure(probe.getsockname()[0], read_tokens(settings), insecure=settings.insecure)
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())  # instead of Ray's handler, which aborts
    http = {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": round(settings.keep_alive_s)}
    serve.start(proxy_location="EveryNode", http_options=http)
    serve.run(build(settings), name=APP)
    logger().info("listening", **urls(settings.host, settings.port))
    stop.wait()
    logger().info("draining")
    home = metrics_home()
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(home, ignore_errors=True)
    return 0
