"""The service on two Ray nodes: what dies takes at most what it was answering with it, and nothing once asked again.

`make ray-check`; the figures are printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lvm.cli.smoke import Smoke, golden_of
from lvm.client import auth_headers
from models.registry.registry import Registry
from tests.conftest import PATIENCE_S, ROOT, SHIPPED, until
from tests.ray.cluster import TOKEN

pytestmark = pytest.mark.ray
HEADERS = {
    "authorization": f"Bearer {TOKEN}",
    "content-type": "application/octet-stream",
    "accept": "application/octet-stream",
}
CONTEXT = np.random.default_rng(0).standard_normal((5, 384)).astype("<f4").tobytes()
RETRY_S = 1.0  # what Retry-After says at least
BURST, EVERY_S = 16, 0.4  # requests at once, seconds: what dies has some of them in flight


class Ray:
    """The cluster in a process of its own, and the registry that it serves."""

    def __init__(self, home: Path) -> None:
        self.registry = Registry(Path(shutil.copytree(SHIPPED, home / "lvm", symlinks=True)))
        with open(home / "log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "ray" / "cluster.py", home / "lvm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        started = self._answer()
        self.urls: list[str] = started["urls"]
        self.address: str = started["address"]

    def tell(self, line: str) -> dict[str, Any]:
        """Have the cluster do something, and return what it says of it."""
        assert self._process.stdin
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray has its say on stdout, too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise AssertionError("the cluster is gone; its log says why")


class Load:
    """Bursts of requests from a thread, in an open loop; each that fails is asked once more, a second later.

    Like a balancer it turns to each node in turn, and to the next where nobody listens.
    """

    def __init__(self, urls: list[str]) -> None:
        self.sent = 0
        self.spans: list[tuple[float, float]] = []  # of first tries, from sent to answered or lost
        self.errors: Counter[str] = Counter()
        self.after_retry: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()
        self.workers: Counter[str] = Counter()
        self._urls, self._done = urls, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=4 * BURST)
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits) as client, asyncio.TaskGroup() as group:
            while not self._done.is_set():
                for number in range(BURST):
                    group.create_task(self._ask(client, number))
                await asyncio.sleep(EVERY_S)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        self.sent += 1
        began = time.monotonic()
        fault = await self._try(client, number)
        self.spans.append((began, time.monotonic()))
        if fault:
            self.errors[fault] += 1
            await asyncio.sleep(RETRY_S)
            again = await self._try(client, number + 1)
            self.after_retry.update([again] if again else [])

    async def _try(self, client: httpx.AsyncClient, number: int) -> str:
        """Ask once; return what went wrong, if anything."""
        url = self._urls[number % len(self._urls)]
        try:
            reply = await client.post(f"{url}/predict", content=CONTEXT, headers=HEADERS)
        except httpx.ConnectError:
            return await self._try(client, number + 1)
        except httpx.TransportError as error:
            return type(error).__name__
        if reply.status_code != 200:
            return f"{reply.status_code} {reply.json()['detail']}"
        self.versions[reply.headers["x-model-version"]] += 1
        self.replicas[reply.headers["x-replica"]] += 1
        self.workers[reply.headers["x-worker"]] += 1
        return ""

    def figures(self, what: str, in_flight: int | None = None) -> str:
        at_kill = "" if in_flight is None else f"{in_flight} in flight at the kill, "
        errors, left = dict(self.errors), self.after_retry.total()
        return (
            f"{what}: {self.sent} requests sent, {at_kill}{self.errors.total()} errors {errors}, {left} after one retry"
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    started = Ray(tmp_path_factory.mktemp("ray"))
    yield started
    started.stop()


def counted(cluster: Ray) -> float:
    """Return the requests to /predict, however they ended, that the metrics of all nodes know."""
    total = 0.0
    for url in cluster.urls:
        text = httpx.get(f"{url}/metrics", headers=auth_headers(TOKEN), timeout=PATIENCE_S).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        mine = (s for s in samples if s.name == "lvm_requests_total" and s.labels["route"] == "/predict")
        total += sum(sample.value for sample in mine)
    return total


def is_whole(cluster: Ray) -> bool:
    """Say whether every deployment has its two replicas."""
    running = cluster.tell("status")["running"]
    return set(running.values()) == {2}


def killed_under_load(cluster: Ray, victim: str) -> tuple[Load, int, dict[str, Any]]:
    """Kill `victim` just after a burst; return the load, over, how many were in flight meanwhile, what was told."""
    until(lambda: is_whole(cluster), "two replicas of everything")
    load = Load(cluster.urls)
    until(lambda: load.sent >= 10 * BURST, "the load")
    sent = load.sent
    until(lambda: load.sent > sent, "a burst")
    kill = cluster.tell(f"kill {victim}")
    sent = load.sent
    until(lambda: load.sent >= sent + 20 * BURST, "what follows")
    load.stop()
    return load, sum(began <= kill["ended"] and ended >= kill["began"] for began, ended in load.spans), kill


def test_it_passes_the_smoke_test_of_a_single_server(cluster: Ray) -> None:
    """Golden vectors, statuses and problems, metrics: as `lvm smoke` holds any service to."""
    with httpx.Client(base_url=cluster.urls[0], headers=auth_headers(TOKEN), timeout=PATIENCE_S) as client:
        results = list(Smoke(client, golden_of(cluster.registry), None).run())
    assert [result for result in results if result.outcome == "failed"] == []


def test_without_a_token_nobody_is_answered(cluster: Ray) -> None:
    for headers in ({}, {"authorization": "Bearer of-something-else-0123"}):
        refused = httpx.post(f"{cluster.urls[0]}/predict", content=CONTEXT, headers=headers, timeout=PATIENCE_S)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.headers["content-type"] == "application/problem+json"


def test_whoever_lacks_rays_own_token_cannot_join(cluster: Ray) -> None:
    """Who may submit to a cluster runs code on it."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    join = [sys.executable, "-c", f"import ray; ray.init(address={cluster.address!r}, logging_level='error')"]
    refused = subprocess.run(join, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert refused.returncode != 0
    assert "auth" in refused.stderr.lower()


def test_a_scrape_of_each_node_adds_up_to_the_requests_sent(cluster: Ray) -> None:
    before = counted(cluster)
    load = Load(cluster.urls)
    until(lambda: load.sent >= 5 * BURST, "the load")
    load.stop()
    assert counted(cluster) - before == load.sent


@pytest.mark.parametrize("deployment", ["primary", "ingress"])
def test_a_replica_killed_loses_at_most_what_it_was_answering(cluster: Ray, deployment: str) -> None:
    load, in_flight, _ = killed_under_load(cluster, deployment)
    print(load.figures(f"replica of {deployment} killed", in_flight), f"by {len(load.workers)} workers")
    assert load.errors.total() <= (0 if deployment == "primary" else in_flight)
    assert not load.after_retry
    assert len(load.replicas) >= 2


def test_a_promotion_under_load_reaches_every_replica_and_fails_nobody(cluster: Ray) -> None:
    until(lambda: is_whole(cluster), "two replicas of everything")
    gru = cluster.registry.resolve("fallback")
    load = Load(cluster.urls)
    until(lambda: load.sent >= 5 * BURST, "the load")
    cluster.registry.point("primary", gru)
    until(lambda: load.versions[gru.version] >= 10 * BURST, "the new version")
    load.stop()
    print(load.figures("version promoted"), dict(load.versions))
    assert not load.errors
    cluster.registry.rollback("primary")


def test_a_rolling_redeploy_under_load_fails_nobody(cluster: Ray) -> None:
    until(lambda: is_whole(cluster), "two replicas of everything")
    load = Load(cluster.urls)
    until(lambda: load.sent >= 5 * BURST, "the load")
    before = set(load.replicas)
    cluster.tell("deploy max_batch=64")
    until(lambda: set(load.replicas) - before, "new replicas")
    load.stop()
    print(load.figures("redeployed"), f"{len(before)} replicas, then {len(set(load.replicas) - before)} others")
    assert not load.errors


def test_more_than_the_queues_hold_is_refused_with_retry_after(cluster: Ray) -> None:
    """Serve's backpressure, of both deployments, is told as ours."""
    cluster.tell("deploy least=2 workers=3 per_node=2 target_s=0.000001 max_batch=1 max_queue=4 concurrency=512")

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(headers=HEADERS, timeout=PATIENCE_S) as client:
            asked = [client.post(f"{cluster.urls[0]}/predict", content=CONTEXT) for _ in range(200)]
            return await asyncio.gather(*asked)

    replies = asyncio.run(ask_all())
    refused = [reply for reply in replies if reply.status_code != 200]
    print(f"overload: {len(replies)} at once, {len(refused)} refused:", Counter(r.json()["detail"] for r in refused))
    assert 0 < len(refused) < len(replies)
    assert {(r.status_code, r.json()["type"]) for r in refused} == {(503, "urn:lvm:problem:overloaded")}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)


def test_where_requests_wait_too_long_there_are_more_replicas(cluster: Ray) -> None:
    """The bound that was deployed is a microsecond: any queue is too long."""
    load = Load(cluster.urls[:1])
    until(lambda: cluster.tell("status")["running"]["primary"] == 3, "a third primary")
    load.stop()


def test_a_node_killed_loses_at_most_what_it_was_answering(cluster: Ray) -> None:
    """One replica a node is the bound: every deployment survives on the other."""
    cluster.tell("deploy")
    load, in_flight, kill = killed_under_load(cluster, "node")
    print(load.figures("node killed", in_flight), kill["replicas"])
    assert load.errors.total() <= in_flight
    assert not load.after_retry
