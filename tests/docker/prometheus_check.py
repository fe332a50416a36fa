"""`python -m tests.docker.prometheus_check BIN`: a real Prometheus scrapes a real service under load, and in trouble.

BIN holds `prometheus` and `promtool`. Exit 0 where the scrape is clean, Prometheus's percentiles of each stage lie in
the very bucket of what the answers said in Server-Timing, it counts every request that the load driver sent, p50, p95
and p99 lie within one bucket of the driver's, every alert fires on a trouble that was really made (`troubles.py`), and
every rule and every panel has something to show. Wants a quiet machine: the driver's clock includes waits that the
server's does not see.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from models.registry.registry import Registry
from tests.conftest import PATIENCE_S
from tests.docker import promql, troubles
from tests.docker.monitored import Failed, Prometheus, check_queries, demand, shortened, started, until, url_of, watched

LVM = Path(sys.executable).with_name("lvm")
RATE, SECONDS, ROWS = 20, 20, 32  # of the net that takes longest: next to it the client's side of a socket is little
CALLS = 400
STAGES = ("decode", "queue", "infer", "encode")
ROUNDING = 0.5e-6  # seconds; Server-Timing has milliseconds with three digits
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
SHIPPED = Path(os.environ.get("LVM_REGISTRY", promql.ROOT / "artifacts" / "lvm"))
OTHER = "gmn"


def check_format(promtool: Path, url: str) -> None:
    """Hold the scrape against promtool's lint; it comes in both formats."""
    for media_type in ("application/openmetrics-text", "text/plain"):
        scrape = httpx.get(f"{url}/metrics", headers={"Accept": media_type}, trust_env=False, timeout=PATIENCE_S)
        demand(scrape.headers["content-type"].startswith(media_type), f"/metrics answers {media_type}")
    done = subprocess.run([promtool, "check", "metrics"], input=scrape.content, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode().strip()
    demand(done.returncode == 0 and not said, f"promtool check metrics is clean {said}".rstrip())


def drive(url: str, *options: str) -> dict[str, Any]:
    """Run the load driver; return its figures."""
    command = [sys.executable, "-m", "loadtest", "--url", url, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=promql.ROOT, check=False)
    if done.returncode not in (0, 1):
        raise Failed(f"the load driver: {done.stderr.strip()}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def counted(prometheus: Prometheus, route: str, expected: int) -> bool:
    """Whether Prometheus has scraped `expected` requests of a route."""
    return prometheus.value(f'sum(lvm_requests_total{{route="{route}"}})') == expected


def compare_stages(prometheus: Prometheus, url: str) -> None:
    """Hold Prometheus's percentiles of each stage against what the answers themselves said: the same observations."""
    said: dict[str, list[float]] = {stage: [] for stage in STAGES}
    body = (promql.ROOT / "examples" / "context.json").read_bytes()
    with httpx.Client(base_url=url, trust_env=False, headers={"Content-Type": "application/json"}) as http:
        for _ in range(CALLS):
            timing = http.post("/predict", content=body).raise_for_status().headers["server-timing"]
            for stage, milliseconds in re.findall(r"(\w+);dur=([\d.]+)", timing):
                said[stage].append(float(milliseconds) / 1e3)
    until(lambda: counted(prometheus, "/predict", CALLS), f"{CALLS} requests in Prometheus")
    edges = prometheus.edges()
    for stage, seconds in said.items():
        for name, quantile in QUANTILES.items():
            selector = f'lvm_request_seconds_bucket{{route="/predict", stage="{stage}"}}'
            found = prometheus.quantile(quantile, selector)
            true = sorted(seconds)[math.ceil(quantile * CALLS) - 1]
            lowest, highest = (bisect_left(edges, true + slip) for slip in (-ROUNDING, ROUNDING))
            if not lowest <= bisect_left(edges, found) <= highest:
                raise Failed(f"{stage} {name}: {found * 1e3:.3f} ms in Prometheus, {true * 1e3:.3f} ms in the answers")
    demand(True, f"p50, p95, p99 of {len(said)} stages lie in the very bucket of {CALLS} answers' Server-Timing")


def compare_driver(prometheus: Prometheus, url: str, before: int) -> None:
    """Hold Prometheus's count and percentiles of one run against the load driver's."""
    began = time.monotonic()
    load = ["--rate", str(RATE), "--seconds", str(SECONDS), "--rows", str(ROWS), "--query", "profile=batch"]
    figures = drive(url, *load, "--wire", "octet", "--arrivals", "poisson")
    sent = figures["sent"]
    until(lambda: counted(prometheus, "/predict", before + sent), f"{sent} requests in Prometheus")
    demand(True, f"Prometheus counts every one of {sent} requests of the driver")
    rows = percentile_rows(prometheus, figures, math.floor(time.monotonic() - began))
    print_percentiles(figures, rows)
    demand(all(abs(apart) <= 1 for *_, apart in rows), "p50, p95 and p99 lie within one bucket of the driver's")


def percentile_rows(
    prometheus: Prometheus, figures: dict[str, Any], window: int
) -> list[tuple[str, float, float, float, int]]:
    """Return, for each quantile: name, Prometheus's ms, the driver's service ms and latency ms, buckets apart."""
    edges, rows = prometheus.edges(), []
    for name, quantile in QUANTILES.items():
        rate = f'rate(lvm_request_seconds_bucket{{route="/predict", stage="total"}}[{window}s])'
        found = prometheus.quantile(quantile, rate)
        service, latency = figures["service_ms"][name], figures["latency_ms"][name]
        apart = bisect_left(edges, found) - bisect_left(edges, service / 1e3)
        rows.append((name, found * 1e3, service, latency, apart))
    return rows


def print_percentiles(figures: dict[str, Any], rows: list[tuple[str, float, float, float, int]]) -> None:
    """Print the comparison as a table."""
    print(f"      {figures['sent']} of {ROWS} rows sent at {RATE}/s, goodput {figures['goodput']:.1f}/s; times in ms")
    print(f"      {'':<5}{'prometheus':>12}{'from write':>12}{'from intent':>13}{'buckets apart':>15}")
    for name, found, service, latency, apart in rows:
        print(f"      {name:<5}{found:>12.3f}{service:>12.3f}{latency:>13.3f}{apart:>15}")


def check_calm(bin_dir: Path, work: Path) -> None:
    """Hold the scrape and its percentiles against what callers saw."""
    with started([LVM, "serve", "--port", "0"], log := work / "serve.log", LVM_REGISTRY=str(SHIPPED)):
        url = url_of(log)
        check_format(bin_dir / "promtool", url)
        rules = shortened(promql.RULES.read_text(), troubles.FACTOR)
        with watched(bin_dir, work / "prometheus", [url], rules) as prometheus:
            compare_stages(prometheus, url)
            check_format(bin_dir / "promtool", url)
            compare_driver(prometheus, url, CALLS)
            firing = prometheus.firing(route="")  # no budgets': on a busy machine a minute's may be spent
            demand(not firing, f"no alert fires that is not of a budget {' '.join(firing)}".rstrip())


@contextmanager
def follower(work: Path) -> Iterator[tuple[str, Path]]:
    """Run a service whose registry is an object store, a directory to it; yield the URL of the one, the other."""
    store = work / "store"
    environment = {"LVM_REGISTRY": store.as_uri(), "LVM_CACHE": str(work / "cache"), "LVM_STORE_S": "0.5"}
    push = [LVM, "push", store.as_uri()]
    subprocess.run(push, env={**os.environ, "LVM_REGISTRY": str(SHIPPED)}, capture_output=True, check=True)
    with started([LVM, "serve", "--port", "0"], log := work / "following.log", **environment):
        yield url_of(log), store


def check_trouble(bin_dir: Path, work: Path) -> None:
    """Have every alert fire, and every panel show something."""
    registry = Registry(work / "registry")
    shutil.copytree(SHIPPED, registry.root, symlinks=True)
    (other,) = [version for version in registry.versions() if version.name == OTHER]
    registry.point("candidate", other, why="prometheus-check")
    command = [*troubles.without_root(), LVM, "serve", "--port", "0"]
    environment = {**troubles.SETTINGS, "LVM_REGISTRY": str(registry.root)}
    rules = shortened(promql.RULES.read_text(), troubles.FACTOR)
    with started(command, log := work / "troubled.log", **environment) as process:
        url = url_of(log)
        with (
            follower(work) as (following, store),
            watched(bin_dir, work / "watching", [url, following], rules) as prometheus,
        ):
            made = troubles.Troubles(url, process, registry, prometheus)
            made.answer_all()
            made.read(1583)
            made.send_long_vectors()
            made.read_what_hardly_changes()
            made.read_what_is_random()
            made.spoil_fallback()
            made.promote_what_disagrees(other.id)
            made.hide_versions()
            made.lose_store(store)
            made.crowd()
            made.starve_fallback()
            made.kill_worker()
            made.read(1583)
            # live scores take a second, and two scrapes another
            time.sleep(4)
            check_queries(prometheus, promql.recorded(), "recording rules", "10m")
            check_queries(prometheus, promql.queries(), "panel queries", "10m")
            made.stop()
    missing = {alert.where for alert in promql.alerts()} - made.fired
    demand(not missing, f"all of {len(promql.alerts())} alerts fired {' '.join(missing)}".rstrip())


def passes(act: Callable[[Path, Path], None]) -> bool:
    """Run one act; where a claim of it does not hold, say which, and what the logs say."""
    with tempfile.TemporaryDirectory(prefix="lvm-prometheus-") as work:
        try:
            act(Path(sys.argv[1]), Path(work))
        except (Failed, httpx.HTTPError) as failed:
            print(f"FAIL  {failed!r}", file=sys.stderr)
            for log in sorted(Path(work).glob("*.log")):
                print(f"      {log.name}: {log.read_text()[-600:]}", file=sys.stderr)
            return False
    return True


def main() -> int:
    """Run the check; 0 where all holds."""
    outcomes = [passes(act) for act in (check_trouble, check_calm)]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
