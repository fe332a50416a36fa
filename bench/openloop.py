"""Open loop at half of each server's own capacity, by `python -m loadtest`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from bench.figures import spread
from bench.load import WrongAnswers
from bench.plan import ROOT, Plan
from bench.servers import SERVICE, Server
from bench.versions import draw
from loadtest.plan import Wire

SHARE, AT = 0.5, 32  # of the throughput in the closed loop at so many connections
FIGURES = ("rate", "p50_ms", "p99_ms", "p99_by_p50", "lag_p99_ms")


def open_loop(plan: Plan, closed: Mapping[str, Any], servers: Sequence[Server]) -> list[dict[str, Any]]:
    """Measure the service and the stronger naive app, each at half its capacity; raises `WrongAnswers`."""
    contexts = plan.out / "traffic" / "contexts.npy"
    contexts.parent.mkdir(parents=True, exist_ok=True)
    np.save(contexts, draw(64, plan.dim))
    cells = [cell for cell in closed["cells"] if cell["connections"] == AT]
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _, cell in product(range(plan.rounds), cells):
        for server in servers:
            if server.name in (SERVICE, cell["strongest"]["naive"]["per_second"]):
                rate = SHARE * cell["servers"][server.name]["per_second"]["median"]
                one = _figures(server, cell["wire"], rate, plan.seconds, str(contexts))
                rows.setdefault((cell["wire"], server.name), []).append(one)
    return [
        {"wire": wire, "server": name} | {figure: spread(one[figure] for one in rounds) for figure in FIGURES}
        for (wire, name), rounds in rows.items()
    ]


def offer(server: Server, wire: Wire, rate: float, seconds: float, *options: str) -> dict[str, Any]:
    """Return the driver's summary of Poisson or, by default, evenly spaced arrivals; `options` are flags of its own.

    Raises:
        WrongAnswers: the outcome broke a threshold, or the driver said nothing but why.
    """
    command = [sys.executable, "-m", "loadtest", "--url", server.base(wire), "--rate", f"{rate:.1f}", "--wire", wire]
    command += ["--seconds", str(seconds), "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        raise WrongAnswers(f"{server.name}, {wire}, open loop at {rate:.0f}/s: {done.stderr or done.stdout}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _figures(server: Server, wire: Wire, rate: float, seconds: float, contexts: str) -> dict[str, float]:
    found = offer(server, wire, rate, seconds, "--warmup", "1", "--contexts", contexts, "--max-error-rate", "0")
    p50, p99 = (found["latency_ms"][name] for name in ("p50", "p99"))
    lag = found["generator_lag_ms"]["p99"]
    return {"rate": rate, "p50_ms": p50, "p99_ms": p99, "p99_by_p50": p99 / p50, "lag_p99_ms": lag}
