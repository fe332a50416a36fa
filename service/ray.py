"""The service on Ray Serve: the graph, and what Ray's errors and ours are to each other. The cluster is Ray's.

The ingress is the app as it is, and borrows its nets; `primary`, `fallback` and `retriever` are deployments of their
own. A replica of these is one alias's engine, which follows the registry as a server's does: a promotion reaches each
within `reload_s`, nothing is restarted, and every answer says which version and which replica made it.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import shutil
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import ray
from pydantic import SecretStr
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from models.registry import Registry, UnknownVersion
from models.retriever import Search
from service.api import check_live
from service.app import create_app
from service.auth import read_tokens
from service.cells import SUFFIX, SharedCells
from service.door import Message, Receive, Scope, Send
from service.engine import Engine, Floats, Live, Prediction
from service.errors import Expired, ModelFailed, Overloaded, ServiceError, Unavailable, is_telling
from service.lineup import PREDICTORS, RETRIEVER, Lineup, RealLoaders
from service.log import configure, logger
from service.metrics import Metrics
from service.remote import Borrow, Facts, Loan, Remote
from service.search import Found
from service.server import bind, check_exposure
from service.settings import Settings, read_settings

APP = "lvm"
QUEUE_WAIT, BUSY = "queue_wait_s", "busy"
FULL = 0.7  # of a replica's time: the rest evens out arrivals
TWICE = 2.0  # at a time: waits grow faster than the load that makes them
SHM = Path("/dev/shm")
LOOK_S = 30.0
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


# ---- a replica


class Asked(NamedTuple):
    """Contexts `(n, T, D)` or a search, and the deadline on this machine's monotonic clock."""

    item: Any
    deadline: float


class Load:
    """How long requests waited, and for how much of the time batches ran, since last told."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._since, self._requests, self._waited_s, self._ran_s = perf_counter(), 0, 0.0, 0.0

    def note(self, waited_s: float, ran_s: float, requests: int) -> None:
        """Count a request that waited and then ran in a batch with others, `requests` in all."""
        self._requests += 1
        self._waited_s += waited_s
        self._ran_s += ran_s / requests

    def tell(self) -> dict[str, float]:
        """Return the mean wait in seconds and the busy share of the time, and begin anew."""
        passed_s = perf_counter() - self._since
        told = {QUEUE_WAIT: self._waited_s / max(self._requests, 1), BUSY: min(1.0, self._ran_s / passed_s)}
        self._begin()
        return told


class Replica:
    """One alias's engine: Serve batches what comes, the engine runs it, the registry says which version."""

    async def __init__(self, alias: str, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._alias, self._settings, self._load = alias, settings, Load()
        self._where: str = serve.get_replica_context().replica_id.unique_id
        configure(settings.log_level)
        self.together.set_max_batch_size(settings.max_batch)
        self.together.set_batch_wait_timeout_s(settings.max_wait_ms / 1000)
        own = settings.model_copy(update={"max_wait_ms": 0.0})  # Serve has waited already
        metrics = Metrics(settings.slo_ms, _cells(settings))
        self._lineup = Lineup(Registry(settings.registry), RealLoaders(own), own, metrics, aliases=(alias,))
        await self._lineup.start()
        if self._lineup.identity(alias) is None:
            raise Unavailable(f"what `{alias}` points at cannot be served: {self._lineup.live.get(alias)}")
        self._watch = asyncio.create_task(self._lineup.watch())

    async def ask(self, item: Any, left_s: float) -> Prediction | Found | ServiceError:
        """Return the answer to contexts `(n, T, D)` or to a `Search`, or why there is none within `left_s` seconds."""
        began = perf_counter()
        answer, requests = await self.together(Asked(item, monotonic() + left_s))
        if not isinstance(answer, ServiceError):
            ran_s = _ran_s(answer)
            self._load.note(perf_counter() - began - ran_s, ran_s, requests)
        return answer  # type: ignore[no-any-return]

    @serve.batch()
    async def together(self, batch: list[Asked]) -> list[tuple[Prediction | Found | ServiceError, int]]:
        """Answer what Serve put together; the engine makes one batch of what comes in one turn of the loop."""
        answers = await asyncio.gather(*map(self._answer, batch))
        return [(answer, len(batch)) for answer in answers]

    async def facts(self) -> tuple[Facts, Live]:
        """Return what serves here, and since when."""
        engine = self._lineup.engines[self._alias]
        assert isinstance(engine, Engine)
        return Facts.of(engine), self._lineup.live[self._alias]

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `QueueWait` goes by."""
        return self._load.tell()

    def check_health(self) -> None:
        """Raise where a batch hangs; Ray then puts another replica in place of this one."""
        check_live(self._lineup, self._settings)
        self._lineup.observe()

    async def _answer(self, asked: Asked) -> Prediction | Found | ServiceError:
        try:
            return await (self._search(asked) if isinstance(asked.item, Search) else self._predict(asked))
        except ServiceError as error:
            return error

    async def _search(self, asked: Asked) -> Found:
        found = await self._lineup.search_engine().search(asked.item, asked.deadline)
        return found._replace(searched=found.searched._replace(replica=self._where))

    async def _predict(self, asked: Asked) -> Prediction:
        engine = self._lineup.engines[self._alias]
        if asked.item.shape[1:] != engine.shape:
            raise Unavailable("a version of another shape went live just now")
        try:
            made = await engine.predict(asked.item, asked.deadline)
        except Exception as error:
            engine.conduct.failed += is_telling(error, patient=False)
            raise
        engine.conduct.answered += 1
        return made._replace(replica=self._where)


def _ran_s(answer: Prediction | Found) -> float:
    return answer.infer_s if isinstance(answer, Prediction) else sum(seconds for _, seconds in answer.stages)


class QueueWait:
    """Serve's autoscaling by how long requests wait: more replicas above `target_s`, one less where the others can."""

    def __init__(self, target_s: float = 0.02) -> None:
        self._target_s = target_s

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return how many replicas there should be; Ray applies bounds, factors and delays."""
        known, replicas = context.aggregated_metrics or {}, context.current_num_replicas
        waits, busy = ([*known.get(name, {}).values()] for name in (QUEUE_WAIT, BUSY))
        if not replicas or not waits:
            return context.target_num_replicas, {}
        excess = sum(waits) / len(waits) / self._target_s
        if excess > 1:
            return replicas * min(excess, TWICE), {}
        others_can = sum(busy) < FULL * (replicas - 1)
        return replicas - 1 if others_can else replicas, {}


# ---- the ingress


class Line:
    """The way to a deployment: deadlines kept, a lost replica made good for once, Ray's errors told as ours."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle, self._took_s = handle, 0.0

    async def facts(self) -> tuple[Facts, Live]:
        """Return what serves there, as one of its replicas says."""
        told: tuple[Facts, Live] = await self._handle.facts.remote()
        return told

    async def predict(self, contexts: Floats, deadline: float) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`; raises `Unavailable` and `Expired`."""
        made: Prediction
        made, took_s = await self._ask(contexts, deadline)
        return made._replace(queue_s=took_s - made.infer_s)

    async def search(self, search: Search, deadline: float) -> Found:
        """Return what `search` finds; raises `Unavailable` and `Expired`."""
        found: Found
        found, took_s = await self._ask(search, deadline)
        return found._replace(queue_s=took_s - _ran_s(found))

    async def _ask(self, item: Any, deadline: float) -> tuple[Any, float]:
        began = monotonic()
        try:
            async with asyncio.timeout(deadline - began):
                answer = await self._ask_twice(item, deadline)
        except TimeoutError as error:
            raise Expired("the deadline passed before there was an answer") from error
        if isinstance(answer, ServiceError):
            raise answer
        took_s = monotonic() - began
        self._took_s += (took_s - self._took_s) * 0.1
        return answer, took_s

    async def _ask_twice(self, item: Any, deadline: float) -> Any:
        """Ask again where the replica is lost: what is asked here leaves no trace, so twice does no harm."""
        try:
            return await self._ask_once(item, deadline)
        except RayError:
            logger().warning("replica lost", deployment=self._handle.deployment_name)
        try:
            return await self._ask_once(item, deadline)
        except RayError as error:
            raise Unavailable("who was to answer is gone, twice", retry_after=self._backlog_s()) from error

    async def _ask_once(self, item: Any, deadline: float) -> Any:
        try:
            return await self._handle.ask.remote(item, deadline - monotonic())
        except BackPressureError as error:
            raise Overloaded("every replica is busy, and so is the queue", retry_after=self._backlog_s()) from error
        except RayServeException as error:
            raise Unavailable("no replica is to be had", retry_after=self._backlog_s()) from error
        except RayTaskError as error:
            raise ModelFailed(f"the replica raised {type(error.cause).__name__}") from error

    def _backlog_s(self) -> int:
        """Return in how many seconds what is out will be answered: by Little's law, what one takes."""
        return max(1, math.ceil(self._took_s))


class Graph:
    """Lends what the deployments serve to the ingress's line-up."""

    def __init__(self, lines: Mapping[str, Line], reload_s: float) -> None:
        self._lines, self._reload_s = lines, reload_s
        self._known: dict[str, tuple[Facts, Live]] = {}

    async def open(self, borrow: Borrow) -> None:
        """Borrow what serves, and again whenever that changes; raises `Unavailable` where there is no primary."""
        await self._look(borrow)
        if PREDICTORS[0] not in self._known:
            raise Unavailable(f"no replica of `{PREDICTORS[0]}` answers")
        self._watch = asyncio.create_task(self._keep(borrow))

    async def close(self) -> None:
        """Look no more."""
        self._watch.cancel()

    async def _keep(self, borrow: Borrow) -> None:
        while True:
            await asyncio.sleep(self._reload_s)
            await self._look(borrow)

    async def _look(self, borrow: Borrow) -> None:
        aliases = [alias for alias in PREDICTORS if alias in self._lines]
        told = await asyncio.gather(*map(self._facts, aliases))
        known = self._known | {alias: facts for alias, facts in zip(aliases, told, strict=True) if facts}
        if known != self._known:
            self._known = known
            engines = {alias: Remote(facts, self._lines[alias].predict) for alias, (facts, _) in known.items()}
            searcher = self._lines.get(RETRIEVER)
            borrow(Loan(engines, {a: live for a, (_, live) in known.items()}, searcher.search if searcher else None))

    async def _facts(self, alias: str) -> tuple[Facts, Live] | None:
        """Return what serves an alias, None where nobody says: the router's breakers judge that."""
        try:
            async with asyncio.timeout(LOOK_S):
                return await self._lines[alias].facts()
        except (TimeoutError, RayError, RayServeException) as error:
            logger().warning("no facts", alias=alias, reason=type(error).__name__)
            return None


@serve.ingress()
class Ingress:
    """The app as it is, over the deployments of a graph by alias."""

    def __init__(self, settings: Settings, graph: dict[str, DeploymentHandle[Any]]) -> None:
        self._settings, self._graph = settings, graph

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app; Serve runs its lifespan."""
        known = self._settings
        configure(known.log_level)
        lender = Graph({alias: Line(handle) for alias, handle in self._graph.items()}, known.reload_s)
        self._app = create_app(known, cells=_cells(known), lender=lender)
        where = serve.get_replica_context().replica_id.unique_id
        self._app.state.process.headers = [(b"x-worker", where.encode())]
        return _without_request_id(self._app)

    def check_health(self) -> None:
        """Raise where an inference thread hangs; bring the shared levels up to date."""
        check_live(self._app.state.lineup, self._settings)
        self._app.state.observe()


def _without_request_id(inner: ASGIApp) -> ASGIApp:
    """Return an app that leaves X-Request-ID to Serve's proxy, which sets it whatever we do, and to the same."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await inner(scope, receive, tell)

    return outer


def _cells(settings: Settings) -> SharedCells:
    """Return this process's row among those of its node, and close the books of the dead: one scrape has the sum."""
    home = _home()
    home.mkdir(mode=0o700, exist_ok=True)
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in home.glob(f"*{SUFFIX}"):
            if not Path(f"/proc/{path.stem}").exists():
                Metrics(settings.slo_ms, SharedCells(home, int(path.stem))).close_books()
    return SharedCells(home, os.getpid())


def _home() -> Path:
    """Return where the processes of this node count."""
    node = ray.get_runtime_context().get_node_id()
    return (SHM if SHM.is_dir() else Path("/tmp")) / f"lvm-{os.getuid()}-{node[:16]}"


# ---- the graph


def build(settings: Settings, least: int = 1, target_s: float = 0.02) -> serve.Application:
    """Return the graph: the ingress, and a deployment for every alias that is set.

    Each has `least` replicas, and up to `workers` where requests wait longer than `target_s` seconds.
    """
    settings = settings.model_copy(update={"registry": settings.registry.resolve()})
    secretless = {"tokens": SecretStr(""), "tokens_file": None, "encoder": "none"}
    share = {} if "threads" in settings.model_fields_set else {"threads": 1}
    theirs = settings.model_copy(update={**secretless, **share})
    registry = Registry(settings.registry)
    aliases = [alias for alias in (*PREDICTORS, RETRIEVER) if _is_set(registry, alias)]
    scaled = {"min_replicas": least, "max_replicas": max(least, settings.workers), "upscale_delay_s": 5}
    by_wait = scaled | {"policy": {"policy_function": "service.ray:QueueWait", "policy_kwargs": {"target_s": target_s}}}
    graph = {alias: _deployment(alias, theirs, by_wait).bind(alias, theirs) for alias in aliases}
    return _ingress(settings, scaled).bind(settings, graph)


def _is_set(registry: Registry, alias: str) -> bool:
    with suppress(UnknownVersion):
        return bool(registry.resolve(alias))
    return False


def _deployment(alias: str, settings: Settings, scaled: dict[str, Any]) -> Any:
    return serve.deployment(Replica).options(
        name=alias,
        autoscaling_config=scaled,
        ray_actor_options={"num_cpus": 0.25},
        max_ongoing_requests=2 * settings.max_batch,  # one batch runs, one gathers
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.grace_s,
        health_check_period_s=1,
    )


def _ingress(settings: Settings, scaled: dict[str, Any]) -> Any:
    return serve.deployment(Ingress).options(
        name="ingress",
        autoscaling_config=scaled | {"target_ongoing_requests": settings.max_batch},
        ray_actor_options={"num_cpus": 0.25},
        max_ongoing_requests=4 * settings.max_queue,  # who is too many is told so by the app, in its words
        graceful_shutdown_timeout_s=settings.drain_s + settings.grace_s,
        health_check_period_s=1,
    )


def app(arguments: dict[str, Any]) -> serve.Application:
    """Return the graph for a Serve config file, whose `args` are settings by name, the environment's below them."""
    return build(read_settings(**arguments))


def serve_until_told(settings: Settings) -> int:
    """Serve on the cluster that RAY_ADDRESS names, else on one of this machine, until told to stop.

    Raises:
        BadSettings: the tokens cannot be read.
        CannotListen: the address is taken, or is not to be listened on without a token.
    """
    configure(settings.log_level)
    with bind(settings.host, settings.port) as probe:
        check_exposure(probe.getsockname()[0], read_tokens(settings), insecure=settings.insecure)
    ray.init(include_dashboard=False if "RAY_ADDRESS" not in os.environ else None, log_to_driver=False)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())  # in place of Ray's, which aborts
    http = {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": round(settings.keep_alive_s)}
    serve.start(proxy_location="EveryNode", http_options=http)
    serve.run(build(settings), name=APP)
    logger().info("listening", url=f"http://{settings.host}:{settings.port}")
    told.wait()
    logger().info("draining")
    home = _home()
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(home, ignore_errors=True)
    return 0
