"""Drives a server in a closed loop from another process: wrk where there is one, else bench.client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

from bench.plan import ROOT
from bench.servers import Server
from bench.traffic import Traffic

SAMPLE = 16  # bench.client reads every so manieth answer while it measures; before that it reads all
SCRIPT = ROOT / "bench" / "wrk.lua"
SPARE_S = 90.0


class WrongAnswers(RuntimeError):
    """A server answered something else than 200, or something else than it should."""


def generator() -> str:
    """Return what makes the load."""
    return "wrk, 1 thread" if shutil.which("wrk") else "bench.client (python, uvloop)"


def warm_up(server: Server, traffic: Traffic, connections: int) -> dict[str, Any]:
    """Send a few hundred requests and read every answer; raises `WrongAnswers`."""
    count = max(200, 8 * connections) if traffic.requests.stat().st_size < 4e6 else 32
    return _client(server, traffic, connections, "--count", str(count))


def measure(server: Server, traffic: Traffic, connections: int, seconds: float) -> dict[str, Any]:
    """Return requests, seconds, `per_second` and latencies (ms) of one closed loop; raises `WrongAnswers`."""
    if shutil.which("wrk"):
        figures = _wrk(server, traffic, connections, seconds)
    else:
        figures = _client(server, traffic, connections, "--seconds", str(seconds), "--every", str(SAMPLE))
    return {**figures, "per_second": figures["requests"] / figures["seconds"]}


def _client(server: Server, traffic: Traffic, connections: int, *options: str) -> dict[str, Any]:
    expected = ("--expected", str(traffic.expected)) if traffic.expected else ()
    command = [sys.executable, "-m", "bench.client", "--url", server.url, "--traffic", str(traffic.requests)]
    command += ["--kind", traffic.kind, "--connections", str(connections), *expected, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    return _checked(server, traffic, connections, json.loads(done.stdout))


def _wrk(server: Server, traffic: Traffic, connections: int, seconds: float) -> dict[str, Any]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={SPARE_S:.0f}s"]
    command += ["-s", str(SCRIPT), server.url, "--", str(traffic.requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + SPARE_S)
    line = next(line for line in done.stdout.splitlines() if line.startswith("BENCH "))
    return _checked(server, traffic, connections, json.loads(line.removeprefix("BENCH ")))


def _checked(server: Server, traffic: Traffic, connections: int, figures: dict[str, Any]) -> dict[str, Any]:
    if figures["errors"] or not figures["requests"]:
        raise WrongAnswers(f"{server.name}, {traffic.requests.stem}, {connections} connections: {figures}")
    return figures
