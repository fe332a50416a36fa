"""From samples to the figures that are compared with F1 to F8; arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest.samples import Samples

Figures = dict[str, Any]
# From, until; seconds of time.monotonic().
Window = tuple[float, float]

REJECTED = (429, 503)
# Statuses that are allowed under overload.
ALLOWED = (200, *REJECTED)
# Largest fraction of requests that may fail at C.
MAX_ERRORS = 0.001
# Fraction of the intended rate; below it a run does not measure the service.
MIN_OFFERED = 0.95
# Seconds in a row.
NORMAL_FOR = 3
# The p99 of a normal second, as a ratio to the worst of those before.
SLACK = 1.25
MIB = 2**20


def steady(samples: Samples, window: Window) -> Figures:
    """Return rates, percentiles and outcomes of arrivals in a window; `is_offered` is whether to trust them."""
    due = samples.between(*window)
    intended, sent = samples.offered(*window)
    percentiles = {f"p{percentile}_ms": due.p_ms(percentile) for percentile in (50, 90, 99)}
    return {
        "intended_rate": intended,
        "offered_rate": sent,
        "is_offered": bool(sent >= MIN_OFFERED * intended),
        "goodput": samples.goodput(*window),
        "success": due.success(),
        "statuses": due.statuses,
        **percentiles,
    }


def overload(samples: Samples, window: Window, capacity: float, steady_p99_ms: float | None, slo_ms: float) -> Figures:
    """Return the figures beyond `capacity` (requests/s): goodput as a share of C, p99 as a share of its limit,
    and counts of rejections.

    They are None if the load was not offered.
    """
    figures = steady(samples, window)
    due = samples.between(*window)
    rejected = np.isin(due.outcome, REJECTED)
    judged: Figures = {
        "goodput_by_c": figures["goodput"] / capacity,
        "p99_by_limit": _ratio(figures["p99_ms"], min(2 * (steady_p99_ms or np.inf), slo_ms)),
        "unexpected": int((~np.isin(due.outcome, ALLOWED)).sum() + due.invalid.sum()),
        "without_retry_after": int((rejected & ~due.retry_after).sum()),
        "rejected_p99_ms": due.p_ms(99, rejected) if rejected.any() else 0.0,
    }
    return figures | (judged if figures["is_offered"] else dict.fromkeys(judged))


def recovery(samples: Samples, before: Window, after: Window) -> float | None:
    """Return the seconds until three seconds in a row were normal, None if they never were.

    A second is normal if its fraction of good responses is at least the lowest of any second of `before`, and its p99
    at most a quarter more than the worst.
    """
    known = samples.slots(*before)
    least = min((slot.success() or 0.0) for slot in known)
    worst = SLACK * max((slot.p_ms(99) or 0.0) for slot in known)
    normal = [_is_normal(slot, least, worst) for slot in samples.slots(*after)]
    starts = range(len(normal) - NORMAL_FOR + 1)
    return next((float(at) for at in starts if all(normal[at : at + NORMAL_FOR])), None)


def promotions(samples: Samples, window: Window, swaps: Sequence[Window]) -> Figures:
    """Return the effect on requests of swaps, each a window from the move of the alias until it is live."""
    due = samples.between(*window)
    in_swap = np.zeros(len(due), bool)
    for begin, end in swaps:
        in_swap |= (due.intended < end) & (due.done >= begin)
    swapping, calm = due.select(in_swap), due.select(~in_swap)
    failed = int((~due.good & ~due.invalid).sum())
    figures = steady(samples, window) | {"failed": failed, "wrong": int(due.invalid.sum())}
    p99s = {"swap_p99_ms": swapping.p_ms(99), "steady_p99_ms": calm.p_ms(99)}
    ratio = _ratio(*p99s.values()) if figures["is_offered"] else None
    return figures | p99s | {"p99_by_steady": ratio, "versions": len(set(due.version[due.good].tolist()))}


def slope_mib(at_s: Sequence[float], resident: Sequence[float]) -> float:
    """Return the slope of resident bytes over seconds, in MiB per ten minutes, by least squares."""
    return float(np.polyfit(np.asarray(at_s), np.asarray(resident, float), 1)[0] * 600 / MIB)


def shutdown(load: Samples, probes: Samples, signalled: float) -> Figures:
    """Return the figures of a shutdown after a signal at `signalled`: stale readiness, and requests left unanswered."""
    late = probes.select(probes.sent >= signalled)
    ready = late.select(late.outcome == 200)
    answered = load.outcome[load.outcome > 0]
    return {
        "ready_for_s": float((ready.sent - signalled).max(initial=0.0)),
        "was_unready": late.count(503),
        "unanswered": int(((load.sent > 0) & (load.outcome < 0)).sum()),
        "unexpected": int((~np.isin(answered, (200, 503))).sum() + load.invalid.sum()),
        "answered": len(answered),
    }


def timeline(samples: Samples, window: Window) -> dict[str, Sequence[float | None]]:
    """Return, by second: good answers, rejections, other outcomes, p50 and p99 [ms] of the good."""
    slots = samples.slots(*window)
    rejected = [int(np.isin(slot.outcome, REJECTED).sum()) for slot in slots]
    good = [int(slot.good.sum()) for slot in slots]
    return {
        "good": good,
        "refused": rejected,
        "other": [len(slot) - a - b for slot, a, b in zip(slots, good, rejected, strict=True)],
        **{f"p{p}_ms": [slot.p_ms(p) for slot in slots] for p in (50, 99)},
    }


def _is_normal(slot: Samples, least: float, worst_ms: float) -> bool:
    return (slot.success() or 0.0) >= least and (slot.p_ms(99) or np.inf) <= worst_ms


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
