"""What happened to every request, as arrays, and the arithmetic on them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Times = dict[str, float | None]

# A request that is written later than this after its intended start was not offered in time.
LAG_LIMIT_MS = 10.0
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


@dataclass(frozen=True)
class Samples:
    """Columns over requests, `(N,)` each; times in seconds of `time.monotonic()`, 0 if it did not happen.

    `outcome` is an HTTP status, or a negative `Failure` if no whole response came. `good` marks a valid 200.
    `version` and `served_by` hold strings, "" if the response named none.
    """

    intended: Floats
    fired: Floats
    sent: Floats
    done: Floats
    outcome: npt.NDArray[np.int16]
    good: Flags
    retry_after: Flags
    version: npt.NDArray[np.object_]
    served_by: npt.NDArray[np.object_]

    @classmethod
    def of(cls, columns: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the samples of `Record.columns()`."""
        given = {name: columns[name] for name in ("intended", "fired", "sent", "done", "outcome")}
        return cls(
            **given,
            good=(given["outcome"] == 200) & (columns["invalid"] == 0),
            retry_after=columns["retry_after"] > 0,
            version=_names(columns["versions"])[columns["version"]],
            served_by=_names(columns["servers"])[columns["served_by"]],
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file that `python -m loadtest --record` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls.of(dict(file))

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Return the samples of several clients, ordered by intended start."""
        columns = [[getattr(part, field.name) for field in fields(cls)] for part in parts]
        whole = cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        return whole.select(np.argsort(whole.intended, kind="stable"))

    def __len__(self) -> int:
        """Count the requests."""
        return len(self.intended)

    def select(self, chosen: npt.NDArray[Any]) -> Self:
        """Return the chosen requests, by flags or by positions."""
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def between(self, begin: float, end: float) -> Self:
        """Return the requests intended from `begin` until before `end`."""
        return self.select((self.intended >= begin) & (self.intended < end))

    def slots(self, begin: float, end: float, width: float = 1.0) -> list[Self]:
        """Return the requests of every whole slot of `width` seconds between `begin` and `end`."""
        edges = begin + width * np.arange(int((end - begin) / width + 1e-6) + 1)
        return [self.between(left, right) for left, right in pairwise(edges)]

    @property
    def latency_ms(self) -> Floats:
        """Milliseconds from the intended start to the end of the response."""
        return (self.done - self.intended) * 1e3

    @property
    def service_ms(self) -> Floats:
        """Milliseconds from the write to the end of the response; meaningless if nothing was sent."""
        return (self.done - self.sent) * 1e3

    @property
    def invalid(self) -> Flags:
        """200s with a body of the wrong shape or with other values than expected."""
        return np.asarray((self.outcome == 200) & ~self.good, bool)

    @property
    def statuses(self) -> dict[str, int]:
        """Requests by outcome."""
        return tally(self.outcome)

    def count(self, outcome: int) -> int:
        """Count the requests with this outcome."""
        return int((self.outcome == outcome).sum())

    def success(self) -> float | None:
        """Return the fraction of good responses, None without requests."""
        return float(self.good.mean()) if len(self) else None

    def p_ms(self, percentile: float, chosen: Flags | None = None) -> float | None:
        """Return a percentile of the latency of good, or of `chosen`, requests by nearest rank; None without any."""
        latency = self.latency_ms[self.good if chosen is None else chosen]
        return float(np.percentile(latency, percentile, method="inverted_cdf")) if len(latency) else None

    def sent_until(self, end: float) -> int:
        """Count the requests written to a socket until `end`, or at most `LAG_LIMIT_MS` later."""
        return int(((self.sent > 0) & (self.sent <= end + LAG_LIMIT_MS / 1e3)).sum())

    def offered(self, begin: float, end: float) -> tuple[float, float]:
        """Return the rates per second between `begin` and `end` of intended requests, and of those sent in time."""
        due = self.between(begin, end)
        return len(due) / (end - begin), due.sent_until(end) / (end - begin)

    def goodput(self, begin: float, end: float) -> float:
        """Return the good responses per second that ended between `begin` and `end`."""
        return float((self.good & (self.done >= begin) & (self.done < end)).sum() / (end - begin))


def times_ms(milliseconds: npt.NDArray[Any]) -> Times:
    """Return mean and percentiles, None without values. By nearest rank: every figure is a time that was measured."""
    if not len(milliseconds):
        return dict.fromkeys(("mean", *PERCENTILES))
    ranked = np.percentile(milliseconds, list(PERCENTILES.values()), method="inverted_cdf")
    figures = {"mean": float(milliseconds.mean()), **dict(zip(PERCENTILES, ranked.tolist(), strict=True))}
    return {name: round(value, 4) for name, value in figures.items()}


def tally(values: npt.NDArray[Any]) -> dict[str, int]:
    """Count equal values, in rising order; empty names are left out."""
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items()) if value != ""}


def _names(names: npt.NDArray[Any]) -> npt.NDArray[np.object_]:
    """Return an array to index by codes; the code -1, no name, finds the last entry."""
    return np.array([*names.tolist(), ""], object)
