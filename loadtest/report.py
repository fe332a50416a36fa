"""From a record to figures: counts, rates, percentiles and the verdict; as JSON, as a table, as Markdown."""

import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loadtest.plan import MIN_OFFERED, Plan
from loadtest.record import Failure, Record
from loadtest.samples import LAG_LIMIT_MS, PERCENTILES, Samples, Times, tally, times_ms
from loadtest.tables import Column, tabulate

_EPSILON_S = 1e-7
_LOST = (Failure.LOST_REUSED, Failure.LOST_FRESH, Failure.LOST_PARTIAL)
# How the value of a threshold compares with its limit.
_MOST, _LEAST = ("<=", operator.le), (">=", operator.ge)
_SIGNS = {"error_rate": _MOST, "offered_rate": _LEAST, "p99_ms": _MOST, "goodput": _LEAST}
_TIMES_SHOWN = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9", "max": "max"}
_COLUMNS: dict[str, Column] = {
    "step": "config.name",
    "wire": lambda step: f"{step['config']['wire']} {step['config']['route']} x {step['config']['rows']}",
    "intended /s": "intended_rate:.1f",
    "offered /s": "offered_rate:.1f",
    "goodput /s": "goodput:.1f",
    "errors": "error_rate:.3%",
    **{f"{label} ms": f"latency_ms.{name}:.2f" for name, label in _TIMES_SHOWN.items()},
    "lag p99 ms": "generator_lag_ms.p99:.2f",
    "thresholds": lambda step: "held" if step["ok"] else "broken: " + ", ".join(_broken(step)),
}


@dataclass(frozen=True)
class Threshold:
    """A limit and the value compared with it; a missing value does not hold."""

    name: str
    limit: float
    value: float | None
    ok: bool


@dataclass(frozen=True)
class Summary:
    """The figures of one step, warm-up left out; rates per second, times in milliseconds.

    arrivals = answered + refused + lost + timeout. `intended_rate` counts arrivals, `offered_rate` those written
    before the window ended. `sent` counts requests written to a socket: the server has seen at most
    warmup_sent + sent. Latency runs from the intended start, service time from the write; both are of good responses
    (200 and valid), `rejected_ms` is the latency of all others. Of `checked` responses, warm-up included, the worst
    one differs by `difference` from its answer.
    """

    config: dict[str, Any]
    arrivals: int
    sent: int
    warmup_sent: int
    answered: int
    statuses: dict[str, int]
    failures: dict[str, int]
    lost_kinds: dict[str, int]
    causes: dict[str, int]
    versions: dict[str, int]
    served_by: dict[str, int]
    connections: dict[str, int]
    checked: int
    difference: float
    error_rate: float
    intended_rate: float
    offered_rate: float
    achieved_rate: float
    goodput: float
    latency_ms: Times
    service_ms: Times
    rejected_ms: Times
    generator_lag_ms: Times
    warnings: list[str]
    thresholds: list[Threshold] = field(default_factory=list)
    ok: bool = False


def measured(plan: Plan, record: Record) -> Samples:
    """Return the requests of a record after the warm-up."""
    return Samples.of(record.columns()).between(record.start + plan.warmup - _EPSILON_S, float("inf"))


def summarise(plan: Plan, record: Record) -> Summary:
    """Return the figures of one step, its thresholds decided."""
    samples = measured(plan, record)
    answered = samples.outcome > 0
    count = len(samples)
    begin = record.start + plan.warmup
    # Responses that trail behind the last arrival are not throughput of the arrival window.
    elapsed = max(plan.seconds, float(samples.done[answered].max(initial=begin)) - begin)
    in_time = samples.sent_until(begin + plan.seconds)
    lag = times_ms((samples.fired - samples.intended) * 1e3)
    good = int(samples.good.sum())
    sent = int((samples.sent > 0).sum())
    figures = Summary(
        config=plan.echo(),
        arrivals=count,
        sent=sent,
        warmup_sent=sum(moment > 0 for moment in record.sent) - sent,
        answered=int(answered.sum()),
        statuses=tally(samples.outcome[answered]),
        failures=_failures(samples),
        lost_kinds={kind.name.removeprefix("LOST_").lower(): samples.count(kind) for kind in _LOST},
        causes=dict(record.causes),
        versions=tally(samples.version),
        served_by=tally(samples.served_by),
        connections={"opened": record.opened, "peak": record.peak},
        checked=record.checked,
        difference=record.difference,
        error_rate=1 - good / count if count else 0.0,
        intended_rate=count / plan.seconds,
        offered_rate=in_time / plan.seconds,
        achieved_rate=int(answered.sum()) / elapsed,
        goodput=good / elapsed,
        latency_ms=times_ms(samples.latency_ms[samples.good]),
        service_ms=times_ms(samples.service_ms[samples.good]),
        rejected_ms=times_ms(samples.latency_ms[answered & ~samples.good]),
        generator_lag_ms=lag,
        warnings=_warnings(lag, in_time, count),
    )
    return _with_verdict(plan, figures)


def to_json(summaries: Sequence[Summary], scenario: str | None = None) -> str:
    """Return one JSON object: the summary, or for a scenario its name, its steps and whether all are ok."""
    if scenario is None:
        return json.dumps(asdict(summaries[0]), indent=2, allow_nan=False)
    steps = [asdict(summary) for summary in summaries]
    return json.dumps(
        {"scenario": scenario, "steps": steps, "ok": all(s.ok for s in summaries)}, indent=2, allow_nan=False
    )


def to_text(summary: Summary) -> str:
    """Return the figures for a terminal."""
    config = summary.config
    lines = [
        f"{config['name']}: POST {config['url']} /{config['route']} {config['wire']} x {config['rows']}, "
        f"{load_of(config)} for {config['seconds']:g} s",
        f"  arrivals {summary.arrivals}   sent {summary.sent}   answered {summary.answered}   "
        f"errors {summary.error_rate:.3%}   connections {summary.connections['peak']}",
        f"  intended {summary.intended_rate:.1f}/s   offered {summary.offered_rate:.1f}/s   "
        f"achieved {summary.achieved_rate:.1f}/s   goodput {summary.goodput:.1f}/s",
        f"  {'ms':<14}" + "".join(f"{name:>10}" for name in ("mean", *PERCENTILES)),
    ]
    for title, times in _rows(summary):
        lines.append(f"  {title:<14}" + "".join(f"{_number(value):>10}" for value in times.values()))
    for title, counts in _tallies(summary):
        lines.append(f"  {title:<14}" + "   ".join(f"{key} {value}" for key, value in counts.items()))
    lines += [f"  {_verdict(threshold)}" for threshold in summary.thresholds]
    return "\n".join(lines)


def to_markdown(summaries: Sequence[Summary]) -> str:
    """Return one Markdown table, a row per step."""
    loops = {summary.config["arrivals"] == "closed" for summary in summaries}
    loop = " and ".join("Closed loop" if is_closed else "Open loop" for is_closed in sorted(loops))
    note = f"{loop}; latency from the intended start, over whole 200 answers; warm-up left out.\n"
    return tabulate(map(asdict, summaries), _COLUMNS) + "\n" + note


def load_of(config: dict[str, Any]) -> str:
    """Return the load of a plan in words."""
    if config["arrivals"] == "closed":
        return f"{config['connections']} connections, closed loop"
    return f"{config['rate']:g}/s {config['arrivals']}, open loop"


def write(directory: Path, summaries: Sequence[Summary], scenario: str | None = None) -> None:
    """Write report.json and report.md into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(to_json(summaries, scenario) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(to_markdown(summaries), encoding="utf-8")


def _with_verdict(plan: Plan, summary: Summary) -> Summary:
    compared = {
        "error_rate": (plan.max_error_rate, summary.error_rate),
        "offered_rate": (plan.min_offered * summary.intended_rate, summary.offered_rate),
        "p99_ms": (plan.max_p99_ms, summary.latency_ms["p99"]),
        "goodput": (plan.min_goodput, summary.goodput),
    }
    held = [
        Threshold(name, limit, value, value is not None and _SIGNS[name][1](value, limit))
        for name, (limit, value) in compared.items()
        if limit is not None
    ]
    return replace(summary, thresholds=held, ok=all(threshold.ok for threshold in held))


def _failures(samples: Samples) -> dict[str, int]:
    return {
        "refused": samples.count(Failure.REFUSED),
        "lost": sum(map(samples.count, _LOST)),
        "timeout": samples.count(Failure.TIMEOUT),
        "invalid": int(samples.invalid.sum()),
    }


def _warnings(lag: Times, in_time: int, count: int) -> list[str]:
    found = [] if in_time >= MIN_OFFERED * count else [f"the load was not offered: {in_time} of {count} sent in time"]
    p99 = lag["p99"]
    if p99 is None or p99 <= LAG_LIMIT_MS:
        return found
    return [*found, f"the generator lags its own schedule: p99 {p99:.1f} ms > {LAG_LIMIT_MS:g} ms; trust no time here"]


def _rows(summary: Summary) -> list[tuple[str, Times]]:
    rows = [("latency", summary.latency_ms), ("service time", summary.service_ms)]
    if summary.rejected_ms["max"] is not None:
        rows.append(("rejected", summary.rejected_ms))
    return [*rows, ("generator lag", summary.generator_lag_ms)]


def _tallies(summary: Summary) -> list[tuple[str, dict[str, int]]]:
    lost = {f"lost, {kind}": count for kind, count in summary.lost_kinds.items() if count}
    tallies = [
        ("statuses", summary.statuses),
        ("failures", {kind: count for kind, count in summary.failures.items() if count} | lost),
        ("causes", summary.causes),
        ("versions", summary.versions),
        ("served by", summary.served_by),
    ]
    return [(title, counts) for title, counts in tallies if counts]


def _broken(step: dict[str, Any]) -> list[str]:
    return [threshold["name"] for threshold in step["thresholds"] if not threshold["ok"]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _verdict(threshold: Threshold) -> str:
    sign, _ = _SIGNS[threshold.name]
    value = "none" if threshold.value is None else f"{threshold.value:.6g}"
    return f"{'ok    ' if threshold.ok else 'BROKEN'} {threshold.name} {value} {sign} {threshold.limit:g}"
