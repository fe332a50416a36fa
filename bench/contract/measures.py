"""From samples to the figures that are held against the contract; arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.contract.samples import Samples, goodput, offered, seconds

Figures = dict[str, Any]
Window = tuple[float, float]  # from, until; seconds of time.monotonic()

ALLOWED = (200, 429, 503)  # answers under overload
MIN_OFFERED = 0.95  # of the intended rate; below it a run says nothing about the service
NORMAL_FOR = 3  # slots of a second in a row
SLACK = 1.25  # p99 of a normal second, to the worst of those before
MIB = 2**20


def steady(samples: Samples, window: Window) -> Figures:
    """Return rates, percentiles and outcomes of arrivals in a window; `is_offered` says whether to trust them."""
    due = samples.between(*window)
    intended, sent = offered(samples, *window)
    percentiles = {f"p{percentile}_ms": due.p_ms(percentile) for percentile in (50, 90, 99)}
    return {
        "intended_rate": intended,
        "offered_rate": sent,
        "is_offered": bool(sent >= MIN_OFFERED * intended),
        "goodput": goodput(samples, *window),
        "success": due.success(),
        "statuses": due.statuses,
        **percentiles,
    }


def overload(samples: Samples, window: Window, capacity: float, steady_p99_ms: float | None, slo_ms: float) -> Figures:
    """Return how it went beyond capacity (requests/s): goodput to C, p99 to its limit, and how it refused.

    Figures are None where the load was not offered.
    """
    figures, due = steady(samples, window), samples.between(*window)
    refused = np.isin(due.outcome, (429, 503))
    judged: Figures = {
        "goodput_by_c": figures["goodput"] / capacity,
        "p99_by_limit": _ratio(figures["p99_ms"], min(2 * (steady_p99_ms or np.inf), slo_ms)),
        "unexpected": int((~np.isin(due.outcome, ALLOWED)).sum()) + due.wrong,
        "without_retry_after": int((refused & ~due.retry_after).sum()),
    }
    judged["rejected_p99_ms"] = due.p_ms(99, refused) if refused.any() else 0.0
    return figures | (judged if figures["is_offered"] else dict.fromkeys(judged))


def recovery(samples: Samples, before: Window, after: Window) -> float | None:
    """Return seconds until the service was as before: three seconds in a row with its success share and p99.

    As before means the least share, and the worst p99 (a quarter more), of any second of `before`. None where it
    was not seen.
    """
    known = seconds(samples, *before)
    least = min((slot.success() or 0.0) for slot in known)
    worst = SLACK * max((slot.p_ms(99) or 0.0) for slot in known)
    normal = [_is_normal(slot, least, worst) for slot in seconds(samples, *after)]
    found = (at for at in range(len(normal) - NORMAL_FOR + 1) if all(normal[at : at + NORMAL_FOR]))
    at = next(found, None)
    return None if at is None else float(at)


def promotions(samples: Samples, window: Window, swaps: Sequence[Window]) -> Figures:
    """Return what a row of swaps, each from the moved alias until it is live, did to requests."""
    due = samples.between(*window)
    in_swap = np.zeros(len(due), bool)
    for begin, end in swaps:
        in_swap |= (due.intended < end) & (due.done >= begin)
    swapping, calm = due.where(in_swap), due.where(~in_swap)
    failed = int((~due.good).sum()) - due.wrong
    figures = steady(samples, window) | {"failed": failed, "wrong": due.wrong}
    p99s = {"swap_p99_ms": swapping.p_ms(99), "steady_p99_ms": calm.p_ms(99)}
    ratio = _ratio(*p99s.values()) if figures["is_offered"] else None
    return figures | p99s | {"p99_by_steady": ratio, "versions": len(set(due.version[due.good].tolist()))}


def slope_mib(at_s: Sequence[float], resident: Sequence[float]) -> float:
    """Return the slope of resident bytes over seconds, in MiB per ten minutes, by least squares."""
    return float(np.polyfit(np.asarray(at_s), np.asarray(resident, float), 1)[0] * 600 / MIB)


def leaving(load: Samples, probes: Samples, told: float) -> Figures:
    """Return how a service left that was told to at `told`: how long readiness lied, and what it left unanswered."""
    ready = probes.where((probes.outcome == 200) & (probes.sent >= told))
    answered = load.outcome[load.outcome > 0]
    return {
        "ready_for_s": float((ready.sent - told).max(initial=0.0)),
        "was_unready": int(((probes.outcome == 503) & (probes.sent >= told)).sum()),
        "unanswered": int(((load.sent > 0) & (load.outcome < 0)).sum()),
        "unexpected": int((~np.isin(answered, (200, 503))).sum()) + load.wrong,
        "answered": len(answered),
    }


def _is_normal(slot: Samples, least: float, worst_ms: float) -> bool:
    return (slot.success() or 0.0) >= least and (slot.p_ms(99) or np.inf) <= worst_ms


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def timeline(samples: Samples, window: Window) -> dict[str, Sequence[float | None]]:
    """Return, by second: good answers, refusals, other outcomes, p50 and p99 [ms] of the good."""
    slots = seconds(samples, *window)
    refused = [int(np.isin(slot.outcome, (429, 503)).sum()) for slot in slots]
    good = [int(slot.good.sum()) for slot in slots]
    return {
        "good": good,
        "refused": refused,
        "other": [len(slot) - a - b for slot, a, b in zip(slots, good, refused, strict=True)],
        **{f"p{p}_ms": [slot.p_ms(p) for slot in slots] for p in (50, 99)},
    }
