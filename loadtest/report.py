"""From a record to figures: counts, rates, percentiles and the verdict; as JSON, as a table, as Markdown."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.plan import MIN_OFFERED, Plan
from loadtest.record import Failure, Labels, Record

Floats = npt.NDArray[np.float64]
Times = dict[str, float | None]

LAG_LIMIT_MS = 10.0
_EPSILON_S = 1e-7
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
_LOST = (Failure.LOST_REUSED, Failure.LOST_FRESH, Failure.LOST_PARTIAL)


@dataclass(frozen=True)
class Threshold:
    """A limit and the value held against it; no value, not held."""

    name: str
    limit: float
    value: float | None
    ok: bool


@dataclass(frozen=True)
class Summary:
    """The figures of one step, warm-up left out; rates per second, times in milliseconds.

    arrivals = answered + refused + lost + timeout; intended_rate is of arrivals, offered_rate of those that were
    written before the window ended; sent counts the requests written to a socket, so
    warmup_sent + sent is what the server may have seen. Latency runs from the intended start, service time
    from the write; both over good answers (200 and whole), `rejected_ms` is the latency of all others.
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


class Columns:
    """The measured part of a record as arrays, the warm-up cut off; times in seconds from its start."""

    def __init__(self, plan: Plan, record: Record) -> None:
        """Cut where the warm-up of `plan` ends."""
        intended = np.array(record.intended)
        begin = record.start + plan.warmup
        self.first = first = int(np.searchsorted(intended, begin - _EPSILON_S))
        self.intended, self.fired, self.sent, self.done = (
            np.array(column)[first:] - begin for column in (record.intended, record.fired, record.sent, record.done)
        )
        self.was_sent = np.array(record.sent)[first:] > 0
        self.outcome = np.array(record.outcome)[first:]
        self.invalid = np.array(record.invalid, dtype=bool)[first:]
        self.version, self.served_by = np.array(record.version)[first:], np.array(record.served_by)[first:]
        self.good = (self.outcome == 200) & ~self.invalid

    @property
    def latency_ms(self) -> Floats:
        """Milliseconds from the intended start to the end, of every arrival."""
        return (self.done - self.intended) * 1e3

    @property
    def service_ms(self) -> Floats:
        """Milliseconds from the write to the end, of every arrival (meaningless where nothing was sent)."""
        return (self.done - self.sent) * 1e3


def summarise(plan: Plan, record: Record) -> Summary:
    """Work out the figures of one step and hold them against its thresholds."""
    columns = Columns(plan, record)
    good, answered = columns.good, columns.outcome > 0
    count = len(columns.outcome)
    # Answers that trail behind the last arrival are not throughput of the arrival window.
    elapsed = max(plan.seconds, float(columns.done[answered].max(initial=0.0)))
    in_time = int((columns.was_sent & (columns.sent <= plan.seconds + LAG_LIMIT_MS / 1e3)).sum())
    lag = _times((columns.fired - columns.intended) * 1e3)
    figures = Summary(
        config=plan.echo(),
        arrivals=count,
        sent=int(columns.was_sent.sum()),
        warmup_sent=int((np.array(record.sent)[: columns.first] > 0).sum()),
        answered=int(answered.sum()),
        statuses=_counts(columns.outcome[answered]),
        failures=_failures(columns),
        lost_kinds={kind.name.removeprefix("LOST_").lower(): _count(columns, kind) for kind in _LOST},
        causes=dict(record.causes),
        versions=_labelled(columns.version, record.versions),
        served_by=_labelled(columns.served_by, record.servers),
        connections={"opened": record.opened, "peak": record.peak},
        error_rate=1 - int(good.sum()) / count if count else 0.0,
        intended_rate=count / plan.seconds,
        offered_rate=in_time / plan.seconds,
        achieved_rate=int(answered.sum()) / elapsed,
        goodput=int(good.sum()) / elapsed,
        latency_ms=_times(columns.latency_ms[good]),
        service_ms=_times(columns.service_ms[good]),
        rejected_ms=_times(columns.latency_ms[answered & ~good]),
        generator_lag_ms=lag,
        warnings=_warnings(lag, in_time, count),
    )
    return _judge(plan, figures)


def to_json(summaries: Sequence[Summary], scenario: str | None = None) -> str:
    """One JSON object: the summary, or for a scenario its name, its steps and whether all are ok."""
    if scenario is None:
        return json.dumps(asdict(summaries[0]), indent=2, allow_nan=False)
    steps = [asdict(summary) for summary in summaries]
    return json.dumps(
        {"scenario": scenario, "steps": steps, "ok": all(s.ok for s in summaries)}, indent=2, allow_nan=False
    )


def to_text(summary: Summary) -> str:
    """Lay the figures out for a terminal."""
    config = summary.config
    lines = [
        f"{config['name']}: POST {config['url']} /{config['route']} {config['wire']} x {config['rows']}, "
        f"{config['rate']:g}/s {config['arrivals']} for {config['seconds']:g} s, open loop",
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
    """One Markdown table, a row per step."""
    heads = ["step", "wire", "intended /s", "offered /s", "goodput /s", "errors", "p50 ms", "p90 ms", "p99 ms",
             "p99.9 ms", "max ms", "lag p99 ms", "thresholds"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(_cells(summary)) + " |" for summary in summaries]
    lines += ["", "Open loop; latency from the intended start, over whole 200 answers; warm-up left out."]
    return "\n".join(lines) + "\n"


def write(directory: Path, summaries: Sequence[Summary], scenario: str | None = None) -> None:
    """Write report.json and report.md into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(to_json(summaries, scenario) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(to_markdown(summaries), encoding="utf-8")


def _judge(plan: Plan, summary: Summary) -> Summary:
    p99 = summary.latency_ms["p99"]
    held = [Threshold("error_rate", plan.max_error_rate, summary.error_rate,
                      summary.error_rate <= plan.max_error_rate)]  # fmt: skip
    least = plan.min_offered * summary.intended_rate
    held.append(Threshold("offered_rate", least, summary.offered_rate, summary.offered_rate >= least))
    if plan.max_p99_ms is not None:
        held.append(Threshold("p99_ms", plan.max_p99_ms, p99, p99 is not None and p99 <= plan.max_p99_ms))
    if plan.min_goodput is not None:
        ok = summary.goodput >= plan.min_goodput
        held.append(Threshold("goodput", plan.min_goodput, summary.goodput, ok))
    return replace(summary, thresholds=held, ok=all(threshold.ok for threshold in held))


def _times(milliseconds: Floats) -> Times:
    if not len(milliseconds):
        return dict.fromkeys(("mean", *PERCENTILES))
    # Nearest rank: every figure is a latency that really happened.
    values = np.percentile(milliseconds, list(PERCENTILES.values()), method="inverted_cdf")
    figures = {"mean": float(milliseconds.mean()), **dict(zip(PERCENTILES, values.tolist(), strict=True))}
    return {name: round(value, 4) for name, value in figures.items()}


def _failures(columns: Columns) -> dict[str, int]:
    return {
        "refused": _count(columns, Failure.REFUSED),
        "lost": sum(_count(columns, kind) for kind in _LOST),
        "timeout": _count(columns, Failure.TIMEOUT),
        "invalid": int(columns.invalid.sum()),
    }


def _count(columns: Columns, outcome: int) -> int:
    return int((columns.outcome == outcome).sum())


def _counts(values: npt.NDArray[Any]) -> dict[str, int]:
    return {str(key): count for key, count in sorted(Counter(values.tolist()).items())}


def _labelled(codes: npt.NDArray[Any], labels: Labels) -> dict[str, int]:
    return {labels.names[int(key)]: count for key, count in _counts(codes[codes >= 0]).items()}


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


def _cells(summary: Summary) -> list[str]:
    latency = summary.latency_ms
    names = ("p50", "p90", "p99", "p999", "max")
    config = summary.config
    return [
        str(config["name"]),
        f"{config['wire']} {config['route']} x {config['rows']}",
        f"{summary.intended_rate:.1f}",
        f"{summary.offered_rate:.1f}",
        f"{summary.goodput:.1f}",
        f"{summary.error_rate:.3%}",
        *(_number(latency[name]) for name in names),
        _number(summary.generator_lag_ms["p99"]),
        "held" if summary.ok else "broken: " + ", ".join(t.name for t in summary.thresholds if not t.ok),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _verdict(threshold: Threshold) -> str:
    sign = ">=" if threshold.name in ("goodput", "offered_rate") else "<="
    value = "none" if threshold.value is None else f"{threshold.value:.6g}"
    return f"{'ok    ' if threshold.ok else 'BROKEN'} {threshold.name} {value} {sign} {threshold.limit:g}"
