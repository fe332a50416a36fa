"""Is the prediction right? Costs are measured, then the knee of a real service by the load tester, then costs again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np

from bench.capacity import measure
from bench.capacity.costs import Costs
from bench.capacity.knee import PROBE_S, WARM_UP, knee, up_and_down, worker_of
from bench.contract.harness import ContractOptions, Fixtures, Harness, cores, launch, write_answers
from bench.machine import core_s, processor_s
from bench.servers import RunningServer, launched
from loadtest.plan import Wire
from loadtest.samples import LAG_LIMIT_MS

WIRE: Wire = "octet"
# Probes of a machine, after those that find where to begin, and of a simulation.
PROBES = 12
SIMULATED = 60
# The search begins at this fraction of the prediction and goes up until a probe does not hold.
START = 0.75
# A probe is repeated if other processes leave less of the core than this, and is tried so often at most.
ALONE, TRIES = 0.9, 3
# Longest wait for a quiet machine before a probe.
WAIT_S = 10
# Largest ratio of predicted and measured knee, either way.
CLOSE = 1.15


@dataclass(frozen=True)
class Case:
    """A load whose knee is predicted and measured: a net that ships, rows of a request, and the objective."""

    net: str
    rows: int
    p99_ms: float = 100.0


# As `bench.contract`, in a thread; and on the event loop.
CASES = (Case("gru", 8), Case("amn", 32))


def check(out: Path, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Return predicted and measured knee of every case, requests per second on one core of this machine."""
    return [_check(out, case) for case in cases]


def _check(out: Path, case: Case) -> dict[str, Any]:
    before = _costs(out, case)
    measured, free = _measure(out, case, START * _predict(before, case))
    after = _costs(out, case)
    predictions = [_predict(costs, case) for costs in (before, after)]
    ratio = sum(predictions) / 2 / measured
    return {
        **asdict(case),
        "predictions": predictions,
        "measured": measured,
        "ratio": ratio,
        "is_met": 1 / CLOSE <= ratio <= CLOSE,
        "free": free,
        "ratio_free": sum(_predict(costs, case, free) for costs in (before, after)) / 2 / measured,
    }


def _costs(out: Path, case: Case) -> Costs:
    return measure.costs(out, [case.net], wires=[WIRE])


def _predict(costs: Costs, case: Case, core: float = 1.0) -> float:
    return knee(worker_of(costs, case.net, WIRE, case.rows, core), case.p99_ms, SIMULATED)


def _measure(out: Path, case: Case, start: float) -> tuple[float, float]:
    """Return the knee of a service on its core, requests per second, and the share of the core that others left it."""
    registry, version = measure.registry_of(out, case.net)
    answers = write_answers(out / f"answers-{case.net}.npz", (version,))
    with launched(launch(registry.root), out / "logs") as server:
        options = ContractOptions(out, case.p99_ms, case.rows, minutes=0)
        harness = Harness(options, server, Fixtures(registry, (version, version), answers))
        shares: list[float] = []
        return up_and_down(lambda rate: _holds(harness, rate, shares), start, PROBES), float(np.mean(shares))


def _holds(harness: Harness, rate: float, shares: list[float]) -> bool:
    """Return whether a rate holds, by a probe during which others left the core alone, if there is one in `TRIES`."""
    for _ in range(TRIES):
        _wait_for_quiet()
        holds, free = _probe(harness, rate)
        if free >= ALONE:
            break
    shares.append(free)
    return holds


def _wait_for_quiet() -> None:
    """Wait until all cores were idle for a second, `WAIT_S` at most; the limiter forgets its rejections."""
    watched = sorted({core for side in cores() for core in side})
    for _ in range(WAIT_S):
        before = [core_s(core) for core in watched]
        sleep(1.0)
        if all(_share(then, core_s(core)) <= 1 - ALONE for core, then in zip(watched, before, strict=True)):
            return


def _probe(harness: Harness, rate: float) -> tuple[bool, float]:
    began = _spent(harness.server)
    found = harness.offer(rate, PROBE_S, WARM_UP * PROBE_S)
    free = 1 - _share(began, _spent(harness.server))
    late_ms = found["generator_lag_ms"]["p99"]
    print(
        f"capacity: {rate:.0f}/s {'holds' if found['ok'] else 'does not hold'}, p99 {found['latency_ms']['p99']} ms, "
        f"errors {found['error_rate']:.4f}, driver late by {late_ms} ms, core left by others {free:.0%}",
        file=sys.stderr,
        flush=True,
    )
    return bool(found["ok"]), free if late_ms <= LAG_LIMIT_MS else 0.0


def _spent(server: RunningServer) -> tuple[float, float]:
    """Return the seconds that the core of the service worked for others, and those that passed."""
    worked, passed = core_s(cores()[0][0])
    return worked - sum(processor_s(server.pid)), passed


def _share(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return the share of the seconds that passed in which there was work."""
    return (after[0] - before[0]) / (after[1] - before[1])
