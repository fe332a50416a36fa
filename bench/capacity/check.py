"""Is the prediction right? Costs are measured, then the knee of a real service by the open-loop driver, costs again."""

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
from bench.capacity.knee import ERRORS, PROBE_S, WARM_UP, knee, up_and_down, worker_of
from bench.capacity.processor import core_s, processor_s
from bench.contract import rig
from bench.contract.rig import Plan, Rig
from bench.servers import Server, launched
from loadtest import contexts
from loadtest.plan import Wire
from models import predictor

WIRE: Wire = "octet"  # the driver says whether each answer is its net's
PROBES = 12  # of a machine, after those that find where to look
START = 0.75  # of the prediction, where looking begins; it goes on until a probe does not hold
CLOSE = 1.15  # most that predicted and measured knee may differ by, either way


@dataclass(frozen=True)
class Case:
    """A load whose knee is predicted and measured: a net that ships, rows of a request, and the objective."""

    net: str
    rows: int
    p99_ms: float = 100.0


CASES = (Case("gru", 8), Case("amn", 32))  # as `bench.contract`, in a thread; and on the event loop


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


def _predict(costs: Costs, case: Case, cores: float = 1.0) -> float:
    return knee(worker_of(costs, case.net, WIRE, case.rows, cores), case.p99_ms)


def _measure(out: Path, case: Case, start: float) -> tuple[float, float]:
    """Return the knee of a service on its core, requests per second, and the share of the core that others left it."""
    registry, version = measure.registry_of(out, case.net)
    given = contexts.load()
    answers = out / f"answers-{case.net}.npz"
    np.savez(answers, allow_pickle=False, **{version.version: predictor.load(version.path, "cpu").predict_batch(given)})
    with launched(rig.launch(registry.root), out / "logs") as server:
        site = Rig(Plan(out, case.p99_ms, case.rows, 0), server, registry, (version, version), answers)
        began = _spent(server)
        found = up_and_down(lambda rate: _holds(site, rate), start, PROBES)
        others, passed = (now - then for now, then in zip(_spent(server), began, strict=True))
        return found, 1 - others / passed


def _holds(site: Rig, rate: float) -> bool:
    limits = {"warmup": WARM_UP * PROBE_S, "max_p99_ms": site.plan.slo_ms, "max_error_rate": ERRORS, "min_offered": 0.95}
    said = site.client(f"probe-{len(site.sent)}", rate, PROBE_S, seed=len(site.sent), **limits).finish()
    verdict = "holds" if said["ok"] else "does not hold"
    print(
        f"capacity: {rate:.0f}/s {verdict}, p99 {said['latency_ms']['p99']} ms, errors {said['error_rate']:.4f}, "
        f"driver late by {said['generator_lag_ms']['p99']} ms",
        file=sys.stderr,
        flush=True,
    )
    sleep(1.0)  # for what was refused to be forgotten
    return bool(said["ok"])


def _spent(server: Server) -> tuple[float, float]:
    """Return the seconds that the core of the service worked for others, and those that passed."""
    worked, passed = core_s(rig.cores()[0][0])
    return worked - sum(processor_s(server.pid)), passed
