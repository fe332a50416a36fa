"""Troubles for a real service, each until the alert that is for it fires in a real Prometheus.

The rules are those that ship, with windows and waits a sixtieth as long: an hour is a minute, shares are as they are.
The service has two workers and settings that bring trouble soon; its primary, fallback and corpus are those that ship.
"""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import httpx
import numpy as np
import orjson

from models.registry.registry import Registry
from tests.docker import promql
from tests.docker.monitored import Failed, Prometheus, demand, until

FACTOR = 60
SETTINGS = {
    "LVM_WORKERS": "2",
    "LVM_THREADS": "1",
    "LVM_CONCURRENCY": "8",
    "LVM_TIMEOUT_MS": "300",
    "LVM_BREAKER_HOLD_S": "3",
    "LVM_RELOAD_S": "0.1",
    "LVM_WATCH_AGREEMENT": "1",  # only the same net again would do
    "LVM_SHADOW_SHARE": "1",
    "LVM_TRUTH_SHARE": "1",
    "LVM_DRAIN_S": "8",
}
BURNS = [f"{name} {window}" for name in ("LvmLatencyBurn", "LvmErrorBurn") for window in ("1h", "6h", "3d")]
CONTEXTS = np.load(promql.ROOT / "loadtest" / "contexts.npy").astype("<f4")  # (64, T, D)
JSON = (promql.ROOT / "examples" / "context.json").read_bytes()
TEXT = "Rabbits are small mammals. Hares live above the ground, and rabbits dig burrows. " * 60
PATIENT = {"X-Request-Timeout-Ms": "60000"}
AS_JSON, AS_OCTETS = {"Content-Type": "application/json"}, {"Content-Type": "application/octet-stream"}
GRU = "/v2/models/fallback/infer"
CROWDED = "/v2/models/{model}/infer"  # a route that none but the crowd calls: a busy machine is slow anywhere


def without_root() -> list[str]:
    """Return what to put before a command, so that permissions hold for it though it is root's."""
    bounded = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    return bounded if os.geteuid() == 0 else []


class Troubles:
    """A service, its registry, the Prometheus that scrapes it, and which alerts have fired so far."""

    def __init__(self, url: str, process: Popen[bytes], registry: Registry, prometheus: Prometheus) -> None:
        self.url, self.process, self.registry, self.prometheus = url, process, registry, prometheus
        self.http = httpx.Client(base_url=url, headers=PATIENT, trust_env=False, timeout=60)
        self.fired: set[str] = set()

    def fires(self, *alerts: str, by: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until all of `alerts`, none of which fired before, do; go on with something `meanwhile`."""
        began, wanted = time.monotonic(), set(alerts)
        if early := wanted & (self.fired | self.prometheus.firing(CROWDED)):
            raise Failed(f"before {by}: {', '.join(early)}")

        def seen() -> bool:
            meanwhile()
            self.fired |= self.prometheus.firing(CROWDED)
            return wanted <= self.fired

        until(seen, f"alert of {by}: {', '.join(alerts)}", 90)
        broken = [text for text in self.prometheus.annotations() if "<" in text]  # <no value>, <error ...>
        if broken:
            raise Failed(f"{by}: {broken[0]}")
        demand(True, f"{', '.join(alerts)}: fired {time.monotonic() - began:.0f} s after {by}")

    def answer_all(self) -> None:
        """Call every route but that of the crowd, in JSON, octets and text."""
        octets = CONTEXTS[0].tobytes()
        for route in ("/predict", "/retrieve"):
            for _ in range(30):
                self.http.post(route, content=JSON, headers=AS_JSON).raise_for_status()
                self.http.post(route, content=octets, headers=AS_OCTETS).raise_for_status()
            for _ in range(4):
                self.http.post(route, json={"text": TEXT}).raise_for_status()
        for path in ("/models", "/readyz", "/metrics", "/nowhere"):
            self.http.get(path)

    def read(self, article: int) -> None:
        """Go through an article of the corpus as a reader does, whose contexts overlap."""
        chunks = self.http.get(f"/articles/{article}").raise_for_status().json()["chunks"]
        vectors = np.stack([np.frombuffer(base64.b64decode(chunk["vector"]), "<f4") for chunk in chunks])
        for start in range(len(vectors) - 4):
            context = vectors[start : start + 5]
            for route in ("/predict", "/retrieve"):
                self.http.post(route, content=context.tobytes(), headers=as_octets(context)).raise_for_status()

    # ---- the troubles

    def send_long_vectors(self) -> None:
        """Inputs three times as long as they should be."""
        body, headers = (3 * CONTEXTS).tobytes(), as_octets(CONTEXTS)
        self.fires(
            "LvmInputDrift",
            by="vectors of length 3",
            meanwhile=lambda: self.http.post("/predict", content=body, headers=headers),
        )

    def read_what_hardly_changes(self) -> None:
        """Readers of articles whose next vector is nearly the last one, so that no net is as good as a baseline."""
        article = np.cumsum(
            np.vstack([CONTEXTS[0, :1] * 20, np.random.default_rng(0).normal(0, 0.02, (99, CONTEXTS.shape[2]))]), 0
        )
        unit = (article / np.linalg.norm(article, axis=1, keepdims=True)).astype("<f4")
        windows = np.stack([unit[start : start + 5] for start in range(len(unit) - 5)])
        self.fires(
            "LvmBelowBaselines",
            by="articles that hardly change",
            meanwhile=lambda: self.http.post("/predict", content=windows.tobytes(), headers=as_octets(windows)),
        )

    def read_what_is_random(self) -> None:
        """Readers of articles whose vectors have nothing to do with each other, so that no answer is near the next."""
        article = np.random.default_rng(0).standard_normal((100, CONTEXTS.shape[2]))
        unit = (article / np.linalg.norm(article, axis=1, keepdims=True)).astype("<f4")
        windows = np.stack([unit[start : start + 5] for start in range(len(unit) - 5)])
        self.fires(
            "LvmBelowCard",
            by="articles of random vectors",
            meanwhile=lambda: self.http.post("/predict", content=windows.tobytes(), headers=as_octets(windows)),
        )

    def spoil_fallback(self) -> None:
        """An alias that points at a damaged version, and back."""
        good = spoil(self.registry, "fallback")
        self.fires("LvmReloadRefused", by="a weight that was changed")
        self.registry.point("fallback", self.registry.find(good), why="prometheus-check")

    def promote_what_disagrees(self, other: str) -> None:
        """A promotion that is taken back while the registry is locked."""
        self.registry.point("primary", self.registry.find(other), why="prometheus-check")
        with locked(self.registry):
            self.fires(
                "LvmRolledBack",
                "LvmRollbackUnrecorded",
                by="a promotion of a net that disagrees, and a registry that stays locked",
                meanwhile=lambda: self.http.post("/predict", content=JSON, headers=AS_JSON),
            )
        self.registry.rollback("primary", why="prometheus-check")

    def hide_versions(self) -> None:
        """A registry that cannot be read."""
        home = self.registry.resolve("primary").path.parent
        mode = home.stat().st_mode
        home.chmod(0)
        try:
            self.fires("LvmReloadFailed", by="a directory that may not be read")
        finally:
            home.chmod(mode)

    def lose_store(self, store: Path) -> None:
        """An object store that has nothing any more, and then has it again."""
        away = store.rename(store.with_name("away"))
        self.fires("LvmStoreAway", by="an object store that is empty")
        away.rename(store)

    def crowd(self) -> None:
        """Four callers with more rows than may be in flight, for a net that needs its time for them."""
        body = tensor_of(np.tile(CONTEXTS, (2, 1, 1)))
        with ThreadPoolExecutor(4) as pool:

            def shove() -> None:
                calls = [pool.submit(self.http.post, GRU, content=body, headers=AS_JSON) for _ in range(8)]
                for call in calls:
                    call.result()

            self.fires(*BURNS, "LvmNearLimit", "LvmRefusing", by="a crowd of large requests", meanwhile=shove)

    def starve_fallback(self) -> None:
        """Batch work with a deadline that GRU cannot keep; AMN stands in, GRU is trusted no more."""
        rows = np.tile(CONTEXTS, (16, 1, 1))
        body = rows.tobytes()
        headers = {**as_octets(rows), "X-Request-Timeout-Ms": SETTINGS["LVM_TIMEOUT_MS"]}
        self.fires(
            "LvmBreakerOpen",
            "LvmFallingBack",
            by="deadlines that the first engine cannot keep",
            meanwhile=lambda: self.http.post("/predict?profile=batch", content=body, headers=headers),
        )

    def kill_worker(self) -> None:
        """A worker that is killed."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        self.fires("LvmWorkerDied", by="SIGKILL to a worker")

    def stop(self) -> None:
        """A drain, and then nobody there."""
        self.process.terminate()
        self.fires("LvmNotReady", by="SIGTERM")
        self.fires("LvmDown", by="the end of the process")


def as_octets(rows: np.ndarray) -> dict[str, str]:
    """Return the header of octets that tells their shape."""
    return {"Content-Type": f"application/octet-stream; shape={'x'.join(map(str, rows.shape))}"}


def tensor_of(contexts: np.ndarray) -> bytes:
    """Return contexts `(n, T, D)` as the Open Inference Protocol wants them, in JSON."""
    data = contexts.ravel().tolist()
    return orjson.dumps({"inputs": [{"name": "context", "shape": contexts.shape, "datatype": "FP32", "data": data}]})


def spoil(registry: Registry, alias: str) -> str:
    """Point `alias` at a copy of its version with a bit of the weights changed; return the id of the version."""

    version = registry.resolve(alias)
    bad = version.path.with_name(f"{version.version}-bad")
    shutil.copytree(version.path, bad)
    weights = bad / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    registry.point(alias, registry.find(bad.name), why="prometheus-check")
    return version.id


@contextmanager
def locked(registry: Registry) -> Iterator[None]:
    """Hold the lock of the registry."""
    with open(registry.root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
