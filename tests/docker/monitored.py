"""A process that is stopped at the end, a Prometheus that scrapes one, and claims that hold or end the check."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.docker import promql

CALM = {"ORT_DISABLE_TELEMETRY": "1"}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LEAST_S = {"[": 5, "for": 2, "interval": 1}  # of a shortened window, wait, interval: a scrape is a second


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
def started(command: list[str | Path], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that is stopped at the end, its output in `log`."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **CALM, **environment})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def url_of(log: Path) -> str:
    """Return where the service that writes `log` listens, once it does."""
    (url,) = until(lambda: re.findall(r'"url": "(http[^"]+)"', log.read_text()), "service", 60)
    return str(url)


class Prometheus:
    """The HTTP API of a Prometheus."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=10)

    def is_ready(self) -> bool:
        """Whether it answers and has scraped every service."""
        return self.http.get("/-/ready").status_code == 200 and self.value('min(up{job="lvm"})') == 1

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

    def firing(self, route: str) -> set[str]:
        """Return the alerts that fire, with their window where they have one; of budgets, those of one route."""
        firing = 'ALERTS{alertstate="firing", %s}'
        others, burns = firing % 'alertname!~".*Burn"', firing % f'alertname=~".*Burn", route="{route}"'
        found = [sample["metric"] for sample in self.query(f"{others} or {burns}")]
        return {f"{alert['alertname']} {alert.get('window', '')}".strip() for alert in found}

    def annotations(self) -> list[str]:
        """Return what the alerts that are pending or fire have to say."""
        alerts = self.http.get("/api/v1/alerts").json()["data"]["alerts"]
        return [text for alert in alerts for text in alert["annotations"].values()]


@contextmanager
def watched(bin_dir: Path, work: Path, urls: list[str], rules: str) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes the services at `urls` every second and evaluates `rules`."""
    work.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command: list[str | Path] = [
        bin_dir / "prometheus",
        f"--config.file={_configure(work, [url.removeprefix('http://') for url in urls], rules)}",
        f"--storage.tsdb.path={work / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with started(command, work.with_suffix(".log")):
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        until(prometheus.is_ready, "Prometheus with a scrape")
        yield prometheus


def _configure(work: Path, targets: list[str], rules: str) -> Path:
    """Write the configuration that ships, aimed at `targets` and scraping every second; return its path."""
    (work / "rules.yml").write_text(rules)
    config = yaml.safe_load((promql.RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    path = work / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def shortened(rules: str, factor: int) -> str:
    """Return `rules` with every window, interval and wait divided by `factor`; shares stay."""

    def shorter(match: re.Match[str]) -> str:
        least = LEAST_S[match[1].rstrip(": ")]
        return f"{match[1]}{max(least, int(match[2]) * SECONDS[match[3]] // factor)}s"

    return re.sub(r"(\[|\b(?:for|interval): )(\d+)([smhd])\b", shorter, rules)


def check_queries(prometheus: Prometheus, asked: list[promql.Asked], kind: str, window: str) -> None:
    """Ask Prometheus all of them; fail where one has nothing to show, or not the labels that its legend wants."""
    bad = []
    for one in asked:
        samples, wanted = prometheus.query(one.filled_in(window)), set(re.findall(r"{{(\w+)}}", one.legend))
        if not samples or not all(wanted <= sample["metric"].keys() for sample in samples):
            bad.append(one.where)
    demand(not bad, f"{kind}: {len(asked) - len(bad)} of {len(asked)} show something {', '.join(bad)}".rstrip())
