"""`python -m tests.docker.prometheus_check BIN`: a real Prometheus scrapes a real service under load.

BIN holds `prometheus` and `promtool`. Exit 0 where the scrape is clean, Prometheus's percentiles of each stage lie in
the very bucket of what the answers said in Server-Timing, it counts every request that the load driver sent, p50, p95
and p99 lie within one bucket of the driver's, every rule and every panel has something to show, and the alert for a
refused version fires. Wants a quiet machine: the driver's clock includes waits that the server's does not see.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
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
import yaml

from models.registry import Registry
from tests.docker import promql

LVM = Path(sys.executable).with_name("lvm")
RATE, SECONDS = 300, 15
CALLS = 400
STAGES = ("decode", "queue", "infer", "encode")
ROUNDING = 0.5e-6  # seconds; Server-Timing has milliseconds with three digits
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
CALM = {"ORT_DISABLE_TELEMETRY": "1"}


class Failed(Exception):
    """A claim that does not hold."""


def demand(holds: object, claim: str) -> None:
    """Print that `claim` holds, or fail with it."""
    if not holds:
        raise Failed(claim)
    print(f"ok    {claim}", flush=True)


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Return what `condition` returns once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise Failed(f"no {what} within {seconds:g} s")


@contextmanager
def started(command: list[str | Path], log: Path, **environment: str) -> Iterator[None]:
    """Run a process that is stopped at the end, its output in `log`."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **CALM, **environment})
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


class Prometheus:
    """The HTTP API of a Prometheus."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=10)

    def is_ready(self) -> bool:
        """Whether it answers and has scraped the service."""
        return self.http.get("/-/ready").status_code == 200 and self.value('up{job="lvm"}') == 1

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query that are numbers."""
        answer = self.http.get("/api/v1/query", params={"query": expr}).json()
        if answer["status"] != "success":
            raise Failed(f"{expr}: {answer['error']}")
        return [sample for sample in answer["data"]["result"] if not math.isnan(float(sample["value"][1]))]

    def value(self, expr: str) -> float | None:
        """Return the one number that `expr` is, or None."""
        samples = self.query(expr)
        return float(samples[0]["value"][1]) if samples else None

    def quantile(self, quantile: float, buckets: str) -> float:
        """Return a quantile, in seconds, of the latency buckets that `buckets` selects."""
        found = self.value(f"histogram_quantile({quantile}, sum by (le) ({buckets}))")
        if found is None:
            raise Failed(f"Prometheus has no quantile of {buckets}")
        return found

    def edges(self) -> list[float]:
        """Return the upper bounds of the latency buckets, in seconds."""
        samples = self.query('lvm_request_seconds_bucket{route="/predict", stage="total"}')
        return sorted(float(sample["metric"]["le"]) for sample in samples)


def free_port() -> int:
    """Return a port that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def configure(directory: Path, target: str) -> Path:
    """Write the configuration that ships, aimed at `target` and scraping every second; return its path."""
    config = yaml.safe_load((promql.RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(promql.RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def check_format(promtool: Path, url: str) -> None:
    """Hold the scrape against promtool's lint; it comes in both formats."""
    for media_type in ("application/openmetrics-text", "text/plain"):
        scrape = httpx.get(f"{url}/metrics", headers={"Accept": media_type}, trust_env=False)
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
    figures = drive(url, "--rate", str(RATE), "--seconds", str(SECONDS), "--wire", "octet")
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
    print(f"      {figures['sent']} sent at {RATE}/s, goodput {figures['goodput']:.1f}/s; times in ms")
    print(f"      {'':<5}{'prometheus':>12}{'from write':>12}{'from intent':>13}{'buckets apart':>15}")
    for name, found, service, latency, apart in rows:
        print(f"      {name:<5}{found:>12.3f}{service:>12.3f}{latency:>13.3f}{apart:>15}")


def swap_and_spoil(root: Path) -> None:
    """Promote something good, then point an alias at something bad."""
    registry = Registry(root)
    version = registry.resolve("fallback")
    registry.point("primary", version, why="prometheus-check")
    bad = version.path.with_name(f"{version.version}-bad")
    shutil.copytree(version.path, bad)
    weights = bad / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    registry.point("fallback", registry.find(bad.name), why="prometheus-check")


def check_expressions(prometheus: Prometheus, quiet: set[str]) -> None:
    """Ask everything that rules and panels ask; all but the `quiet` must answer."""
    for kind, asked in (
        ("recording rules", promql.recorded()),
        ("panel queries", promql.panels()),
        ("alerts", promql.alerts()),
    ):
        empty = {one.where for one in asked if not prometheus.query(one.filled_in("1m"))}
        surprising = sorted(empty - quiet)
        shown = len(asked) - len(empty)
        demand(not surprising, f"{kind}: {shown} of {len(asked)} show something {' '.join(surprising)}".rstrip())


def check(bin_dir: Path, work: Path) -> None:
    """Run every check."""
    registry = work / "registry"
    shutil.copytree(os.environ.get("LVM_REGISTRY", promql.ROOT / "artifacts" / "lvm"), registry, symlinks=True)
    port, log = free_port(), work / "serve.log"
    with started([LVM, "serve", "--port", "0"], log, LVM_REGISTRY=str(registry)):
        (url,) = until(lambda: re.findall(r'"url": "(http[^"]+)"', log.read_text()), "service", 60)
        config = configure(work, url.removeprefix("http://"))
        command: list[str | Path] = [
            bin_dir / "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={work / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        check_format(bin_dir / "promtool", url)
        with started(command, work / "prometheus.log"):
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            until(prometheus.is_ready, "Prometheus with a scrape")
            compare_stages(prometheus, url)
            compare_driver(prometheus, url, CALLS)
            sent = drive(url, "--rate", "30", "--seconds", "3", "--route", "retrieve")["sent"]
            until(lambda: counted(prometheus, "/retrieve", sent), f"{sent} retrievals in Prometheus")
            swap_and_spoil(registry)
            firing = 'ALERTS{alertstate="firing"}'
            until(lambda: prometheus.query(firing), "alert of a refused version")
            names = {sample["metric"]["alertname"] for sample in prometheus.query(firing)}
            demand(names == {"LvmReloadRefused"}, f"the alerts that fire: {', '.join(names)}")
            check_expressions(prometheus, {alert.where for alert in promql.alerts()} - names)
            check_format(bin_dir / "promtool", url)


def main() -> int:
    """Run the check; 0 where all holds."""
    with tempfile.TemporaryDirectory(prefix="lvm-prometheus-") as work:
        try:
            check(Path(sys.argv[1]), Path(work))
        except Failed as failed:
            print(f"FAIL  {failed}", file=sys.stderr)
            for log in sorted(Path(work).glob("*.log")):
                print(f"      {log.name}: {log.read_text()[-600:]}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
