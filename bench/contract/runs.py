"""The runs: each puts a load on the service and returns its figures."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

from bench.contract import capacity_search, measures
from bench.contract.harness import ALIAS, ContractOptions, Fixtures, Harness, launch, running
from bench.contract.measures import Figures, Window
from bench.load import LoadTest
from bench.machine import rss_mb
from bench.metrics import count_series, outcomes, reloads
from bench.servers import RunningServer, launched
from loadtest.samples import Samples
from models.registry.registry import Version

# Requests per second at which the search for C begins.
START = 25.0
# Fraction of C.
STEADY = 0.7
# Probes per second and route.
PROBES = 10.0
# Seconds that a client has to start, before anything counts.
SETTLE_S = 2.0
# With 10 s before, the worst second before was by chance two thirds of one long after.
BEFORE_S, AFTER_S = 30.0, 12.0
# Loading takes a third of a second of the only core, of which 0.7 C leaves little.
PROMOTIONS, EVERY_S = 100, 2.0
SWAP_TAIL_S = 0.1
STARTS = 3
# Of the settings that ship.
DRAIN_AND_GRACE_S = 21.0


def find_capacity(harness: Harness) -> Figures:
    """Return C in requests per second, and every probe on the way there."""
    probes: list[Figures] = []

    def try_once(rate: float, seconds: float) -> bool:
        found = harness.offer(rate, seconds)
        times = {f"{name}_ms": found["latency_ms"][name] for name in ("p50", "p90", "p99")}
        probes.append({"rate": rate, "goodput": found["goodput"], "ok": found["ok"], **times})
        verdict = "holds" if found["ok"] else "does not hold"
        print(f"figures: {rate:.0f}/s {verdict}, p99 {times['p99_ms']} ms", file=sys.stderr, flush=True)
        # Until the limiter has forgotten its rejections.
        sleep(1.0)
        return bool(found["ok"])

    def holds(rate: float, seconds: float) -> bool:
        # Other processes of the machine can spoil a probe, they never improve one.
        return try_once(rate, seconds) or try_once(rate, seconds)

    found = capacity_search.find(lambda rate: holds(rate, 4), lambda rate: holds(rate, 30), start=START)
    return {"per_second": found, "probes": probes}


def overload(harness: Harness, c: float, times: float, seconds: float) -> Figures:
    """Offer 0.7 C throughout and, in the middle, `times` C for `seconds`, with probes from other processes."""
    whole = SETTLE_S + BEFORE_S + seconds + AFTER_S
    name = f"{times:g}C"
    probes = [harness.probe(f"{name}-{route}", route, PROBES, whole) for route in ("livez", "readyz")]
    base = harness.load(f"{name}-base", STEADY * c, whole)
    sleep(SETTLE_S + BEFORE_S)
    more = harness.load(f"{name}-more", (times - STEADY) * c, seconds, seed=1).samples()
    samples = Samples.joined([base.samples(), more])
    seen = Samples.joined(probe.samples() for probe in probes)
    begin = float(more.intended[0])
    end = float(more.intended[-1])
    before = (float(samples.intended[0]) + 1, begin - 0.5)
    return _overload(harness, samples, seen, (before, (begin, end)), c)


def _overload(harness: Harness, samples: Samples, probes: Samples, windows: tuple[Window, Window], c: float) -> Figures:
    before, during = windows
    last = float(samples.intended[-1])
    steady = measures.steady(samples, before)
    probed = probes.between(*during)
    beyond = measures.overload(samples, during, c, steady["p99_ms"], harness.options.slo_ms)
    is_offered = beyond["is_offered"]
    return {
        "before": steady,
        "during": beyond,
        "recovery_s": measures.recovery(samples, before, (during[1], last)) if is_offered else None,
        "probes": {"p99_ms": probed.p_ms(99, probed.outcome > 0) if is_offered else None, "statuses": probed.statuses},
        "at_s": [moment - before[0] for moment in during],
        "timeline": measures.timeline(samples, (before[0], last)),
    }


def promotions(harness: Harness, c: float) -> Figures:
    """Swap an alias between two versions under 0.7 C; compare each answer with the one of its version."""
    seconds = SETTLE_S + 2 + PROMOTIONS * EVERY_S * 1.2
    load = harness.load("promotions", STEADY * c, seconds)
    sleep(SETTLE_S + 2)
    began = monotonic()
    swaps: list[Window] = []
    known = reloads(harness.server.url, ALIAS)
    while len(swaps) < PROMOTIONS and monotonic() < began + seconds - 4:
        swaps.append(_promote(harness, harness.fixtures.versions[(len(swaps) + 1) % 2]))
        sleep(max(0.0, began + len(swaps) * EVERY_S - monotonic()))
    figures = measures.promotions(load.samples(), (began - 2, swaps[-1][1]), swaps)
    return figures | {"live": reloads(harness.server.url, ALIAS) - known}


def _promote(harness: Harness, version: Version) -> Window:
    """Move the alias; return the window from then until it is live."""
    before = reloads(harness.server.url, ALIAS)
    began = monotonic()
    harness.fixtures.registry.point(ALIAS, version, why="to be measured")
    while reloads(harness.server.url, ALIAS) == before and monotonic() < began + 10:
        sleep(0.2)
    return began, monotonic() + SWAP_TAIL_S


def fairness(harness: Harness, c: float, seconds: float = 20) -> Figures:
    """Let one client offer 10 C, and another with another address 0.1 C at the same time."""
    greedy = harness.load("greedy", 10 * c, seconds)
    sleep(SETTLE_S)
    modest = harness.load("modest", 0.1 * c, seconds - 2 * SETTLE_S, source="127.0.0.2").samples()
    during = (float(modest.intended[0]), float(modest.intended[-1]))
    offers = {"greedy": measures.steady(greedy.samples(), during), "modest": measures.steady(modest, during)}
    is_offered = all(each["is_offered"] for each in offers.values())
    return {**offers, "success": modest.success() if is_offered else None}


def soak(harness: Harness, c: float) -> Figures:
    """Put all routes under half of C for long, after a warm-up; watch the process and its series."""
    for load in _mixed(harness, c, "warm-up", 20):
        assert load.summary
    sleep(1.0)
    idle = _state(harness.server)
    seconds = harness.options.minutes * 60
    loads = _mixed(harness, c, "soak", seconds)
    began = monotonic()
    at_s: list[float] = []
    resident: list[float] = []
    while monotonic() < began + seconds:
        at_s.append(monotonic() - began)
        resident.append(rss_mb(harness.server.pid))
        sleep(1.0)
    summaries = [load.summary for load in loads]
    sleep(1.0)
    figures = {
        "slope_mib": measures.slope_mib(at_s, [mb * 1e6 for mb in resident]),
        "grown": {name: value - idle[name] for name, value in _state(harness.server).items()},
        "error_rate": max(each["error_rate"] for each in summaries),
    }
    is_offered = all(each["offered_rate"] >= measures.MIN_OFFERED * each["intended_rate"] for each in summaries)
    judged = figures if is_offered else dict.fromkeys(figures)
    return {**judged, "is_offered": is_offered, "at_s": at_s, "rss_mb": resident}


def _mixed(harness: Harness, c: float, name: str, seconds: float) -> list[LoadTest]:
    # so many searches that drift has its first verdict, which adds series, in the 20 seconds of the warm-up
    searches = max(3.0, 0.05 * c)
    return [
        harness.load(f"{name}-octet", 0.4 * c, seconds),
        harness.start(f"{name}-json", max(1.0, 0.1 * c), seconds, wire="json"),
        harness.start(f"{name}-retrieve", searches, seconds, wire="octet", route="retrieve", rows=1),
    ]


def _state(server: RunningServer) -> dict[str, int]:
    process = Path(f"/proc/{server.pid}")
    held = {name: len(list(process.glob(f"{place}/*"))) for name, place in (("descriptors", "fd"), ("threads", "task"))}
    return {**held, "labels": count_series(server.url)}


def life(options: ContractOptions, fixtures: Fixtures, c: float) -> Figures:
    """Start the service some times; stop the last one by SIGTERM under 0.7 C."""
    ready = []
    for _ in range(STARTS - 1):
        with launched(launch(fixtures.registry.root), options.out / "logs") as server:
            ready.append(server.ready_s)
    with running(options, fixtures) as harness:
        stopped = _stop(harness, c)
        ready.append(harness.server.ready_s)
    return {"ready_s": max(ready), "starts_s": ready, **stopped}


def _stop(harness: Harness, c: float) -> Figures:
    load = harness.load("leaving", STEADY * c, 8)
    probes = harness.probe("leaving-readyz", "readyz", 50, 8)
    sleep(SETTLE_S + 2)
    os.kill(harness.server.pid, signal.SIGTERM)
    signalled = monotonic()
    gone = os.waitid(os.P_PID, harness.server.pid, os.WEXITED | os.WNOWAIT)
    exit_s = monotonic() - signalled
    assert gone is not None
    figures = measures.shutdown(load.samples(), probes.samples(), signalled)
    return {**figures, "exit_s": exit_s, "exit_status": gone.si_status, "exit_by_grace": exit_s / DRAIN_AND_GRACE_S}


def reconciled(harness: Harness, run: Callable[[], Figures]) -> Figures:
    """Return a run's figures, and by how much the requests sent and the outcomes in /metrics differ."""
    done = len(harness.loads)
    before = outcomes(harness.server.url)
    figures = run()
    counted = {key: value - before.get(key, 0) for key, value in outcomes(harness.server.url).items()}
    sent = sum(load.sent for load in harness.loads[done:])
    return {**figures, "sent": sent, "outcomes": counted, "difference": abs(sent - counted["all"])}
