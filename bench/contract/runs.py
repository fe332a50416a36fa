"""The runs: each puts a load on the service and returns its figures."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

from bench.contract import capacity, measures
from bench.contract.measures import Figures, Window
from bench.contract.rig import ALIAS, Client, Plan, Rig, Stock, counted, launch, reloads, running, series
from bench.contract.samples import Samples, joined
from bench.servers import Server, launched, rss_mb
from models.registry.registry import Version

START = 25.0  # requests/s
STEADY = 0.7  # of C
PROBES = 10.0  # per second and route
SETTLE_S = 2.0  # for a client to start, before anything counts
BEFORE_S, AFTER_S = 30.0, 12.0  # at 10, the worst second before was by chance two thirds of one long after
PROMOTIONS, EVERY_S = 100, 2.0  # loading takes a third of a second of the only core, of which 0.7C leaves little
SWAP_TAIL_S = 0.1
STARTS = 3
DRAIN_AND_GRACE_S = 21.0  # of the settings that ship


def find_capacity(rig: Rig) -> Figures:
    """Return C in requests per second, and every probe on the way there."""
    probes: list[Figures] = []

    def ask(rate: float, seconds: float) -> bool:
        limits = {"warmup": 1, "max_p99_ms": rig.plan.slo_ms, "max_error_rate": 0.001, "min_offered": 0.95}
        said = rig.client(f"capacity-{len(probes)}", rate, seconds, seed=len(probes), **limits).finish()
        times = {f"{name}_ms": said["latency_ms"][name] for name in ("p50", "p90", "p99")}
        probes.append({"rate": rate, "goodput": said["goodput"], "ok": said["ok"], **times})
        _say(f"{rate:.0f}/s {'holds' if said['ok'] else 'does not hold'}, p99 {times['p99_ms']} ms")
        sleep(1.0)  # for what was refused to be forgotten
        return bool(said["ok"])

    def holds(rate: float, seconds: float) -> bool:
        return ask(rate, seconds) or ask(rate, seconds)  # others on the machine spoil a probe, they never flatter one

    found = capacity.find(lambda rate: holds(rate, 4), lambda rate: holds(rate, 30), start=START)
    return {"per_second": found, "probes": probes}


def overload(rig: Rig, c: float, times: float, seconds: float) -> Figures:
    """Offer 0.7 C throughout and, in the middle, `times` C for `seconds`; probes from another process all the while."""
    whole = SETTLE_S + BEFORE_S + seconds + AFTER_S
    name = f"{times:g}C"
    probes = [rig.probe(f"{name}-{route}", route, PROBES, whole) for route in ("livez", "readyz")]
    base = rig.client(f"{name}-base", STEADY * c, whole)
    sleep(SETTLE_S + BEFORE_S)
    more = rig.client(f"{name}-more", (times - STEADY) * c, seconds, seed=1).samples()
    samples, seen = joined([base.samples(), more]), joined([probe.samples() for probe in probes])
    begin, end = float(more.intended[0]), float(more.intended[-1])
    before = (float(samples.intended[0]) + 1, begin - 0.5)
    return _overload(rig, samples, seen, (before, (begin, end)), c)


def _overload(rig: Rig, samples: Samples, probes: Samples, windows: tuple[Window, Window], c: float) -> Figures:
    before, during = windows
    last = float(samples.intended[-1])
    steady = measures.steady(samples, before)
    asked, beyond = probes.between(*during), measures.overload(samples, during, c, steady["p99_ms"], rig.plan.slo_ms)
    is_offered = beyond["is_offered"]
    return {
        "before": steady,
        "during": beyond,
        "recovery_s": measures.recovery(samples, before, (during[1], last)) if is_offered else None,
        "probes": {"p99_ms": asked.p_ms(99, asked.outcome > 0) if is_offered else None, "statuses": asked.statuses},
        "at_s": [moment - before[0] for moment in during],
        "timeline": measures.timeline(samples, (before[0], last)),
    }


def promotions(rig: Rig, c: float) -> Figures:
    """Swap the alias that is asked between two versions under 0.7 C, and look whose answers came."""
    seconds = SETTLE_S + 2 + PROMOTIONS * EVERY_S * 1.2
    load = rig.client("promotions", STEADY * c, seconds)
    sleep(SETTLE_S + 2)
    began = monotonic()
    swaps: list[Window] = []
    known = reloads(rig.server.url)
    while len(swaps) < PROMOTIONS and monotonic() < began + seconds - 4:
        swaps.append(_promote(rig, rig.versions[(len(swaps) + 1) % 2]))
        sleep(max(0.0, began + len(swaps) * EVERY_S - monotonic()))
    figures = measures.promotions(load.samples(), (began - 2, swaps[-1][1]), swaps)
    return figures | {"live": reloads(rig.server.url) - known}


def _promote(rig: Rig, version: Version) -> Window:
    """Move the alias; return from when until when it took to be live."""
    before, began = reloads(rig.server.url), monotonic()
    rig.registry.point(ALIAS, version, why="to be measured")
    while reloads(rig.server.url) == before and monotonic() < began + 10:
        sleep(0.2)
    return began, monotonic() + SWAP_TAIL_S


def fairness(rig: Rig, c: float, seconds: float = 20) -> Figures:
    """Let one client offer 10 C and another, of another address, 0.1 C meanwhile."""
    greedy = rig.client("greedy", 10 * c, seconds)
    sleep(SETTLE_S)
    modest = rig.client("modest", 0.1 * c, seconds - 2 * SETTLE_S, source="127.0.0.2").samples()
    during = (float(modest.intended[0]), float(modest.intended[-1]))
    offers = {"greedy": measures.steady(greedy.samples(), during), "modest": measures.steady(modest, during)}
    is_offered = all(each["is_offered"] for each in offers.values())
    return {**offers, "success": modest.success() if is_offered else None}


def soak(rig: Rig, c: float) -> Figures:
    """Put all routes under half of C for long, after a warm-up, and watch the process and its series."""
    for client in _mixed(rig, c, "warm-up", 20):
        client.finish()
    sleep(1.0)
    idle = _state(rig.server)
    clients = _mixed(rig, c, "soak", rig.plan.minutes * 60)
    began, rows = monotonic(), []
    while monotonic() < began + rig.plan.minutes * 60:
        rows.append((monotonic() - began, rss_mb(rig.server.pid)))
        sleep(1.0)
    said = [client.finish() for client in clients]
    sleep(1.0)
    grown = {name: value - idle[name] for name, value in _state(rig.server).items()}
    at, resident = zip(*rows, strict=True)
    slope = measures.slope_mib(at, [mb * 1e6 for mb in resident])
    figures = {"slope_mib": slope, "grown": grown, "error_rate": max(each["error_rate"] for each in said)}
    is_offered = all(each["offered_rate"] >= measures.MIN_OFFERED * each["intended_rate"] for each in said)
    judged = figures if is_offered else dict.fromkeys(figures)
    return {**judged, "is_offered": is_offered, "at_s": at, "rss_mb": resident}


def _mixed(rig: Rig, c: float, name: str, seconds: float) -> list[Client]:
    plain = {"rows": 1, "query": ""}
    return [
        rig.client(f"{name}-octet", 0.4 * c, seconds),
        Client(rig, f"{name}-json", max(1.0, 0.1 * c), seconds, {"wire": "json"}),
        Client(rig, f"{name}-retrieve", max(1.0, 0.05 * c), seconds, {"wire": "octet", "route": "retrieve", **plain}),
    ]


def _state(server: Server) -> dict[str, int]:
    process = Path(f"/proc/{server.pid}")
    held = {name: len(list(process.glob(f"{place}/*"))) for name, place in (("descriptors", "fd"), ("threads", "task"))}
    return {**held, "labels": series(server.url)}


def life(plan: Plan, stock: Stock, c: float) -> Figures:
    """Start the service some times; tell the last one to leave under 0.7 C."""
    ready = []
    for _ in range(STARTS - 1):
        with launched(launch(stock[0].root), plan.out / "logs") as server:
            ready.append(server.ready_s)
    with running(plan, stock) as rig:
        left = _leave(rig, c)
        ready.append(rig.server.ready_s)
    return {"ready_s": max(ready), "starts_s": ready, **left}


def _leave(rig: Rig, c: float) -> Figures:
    load, probes = rig.client("leaving", STEADY * c, 8), rig.probe("leaving-readyz", "readyz", 50, 8)
    sleep(SETTLE_S + 2)
    os.kill(rig.server.pid, signal.SIGTERM)
    told = monotonic()
    gone = os.waitid(os.P_PID, rig.server.pid, os.WEXITED | os.WNOWAIT)
    exit_s = monotonic() - told
    assert gone is not None
    figures = measures.leaving(load.samples(), probes.samples(), told)
    return {**figures, "exit_s": exit_s, "exit_status": gone.si_status, "exit_by_grace": exit_s / DRAIN_AND_GRACE_S}


def reconciled(rig: Rig, run: Callable[[], Figures]) -> Figures:
    """Return a run's figures and by how many requests sent and outcomes in /metrics differ."""
    done, before = len(rig.sent), counted(rig.server.url)
    figures = run()
    after = counted(rig.server.url)
    outcomes = {key: value - before.get(key, 0) for key, value in after.items()}
    sent = sum(rig.sent[done:])
    return {**figures, "sent": sent, "outcomes": outcomes, "difference": abs(sent - outcomes["all"])}


def _say(text: str) -> None:
    print(f"figures: {text}", file=sys.stderr, flush=True)
