"""What became of every request of some clients, as arrays, and the arithmetic on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.report import LAG_LIMIT_MS

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int_]


@dataclass(frozen=True)
class Samples:
    """Columns over arrivals; times in seconds of `time.monotonic()`, 0 where it did not happen.

    `outcome` is an HTTP status, or negative where no whole answer came; `good` a right 200.
    """

    intended: Floats
    sent: Floats
    done: Floats
    outcome: npt.NDArray[np.int16]
    good: Flags
    retry_after: Flags
    version: npt.NDArray[np.str_]

    def __len__(self) -> int:
        """Count the arrivals."""
        return len(self.intended)

    def where(self, chosen: Flags | Places) -> Samples:
        """Return the arrivals chosen, by flags or in the order of places."""
        return Samples(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def between(self, begin: float, end: float) -> Samples:
        """Return the arrivals intended from `begin` until `end`."""
        return self.where((self.intended >= begin) & (self.intended < end))

    @property
    def latency_ms(self) -> Floats:
        """Milliseconds from the intended start to the end."""
        return (self.done - self.intended) * 1e3

    @property
    def wrong(self) -> int:
        """200s that were not whole, or not what their version answers."""
        return int(((self.outcome == 200) & ~self.good).sum())

    @property
    def statuses(self) -> dict[str, int]:
        """Count the outcomes; negative ones are the driver's kinds of failure."""
        return {str(outcome): count for outcome, count in sorted(Counter(self.outcome.tolist()).items())}

    def success(self) -> float | None:
        """Return the share of good answers, None without arrivals."""
        return float(self.good.mean()) if len(self) else None

    def p_ms(self, percentile: float, chosen: Flags | None = None) -> float | None:
        """Return a percentile of the latency, by nearest rank, of good answers or those chosen; None without any."""
        latency = self.latency_ms[self.good if chosen is None else chosen]
        return float(np.percentile(latency, percentile, method="inverted_cdf")) if len(latency) else None


def read(path: Path) -> Samples:
    """Read the record of one client, as `python -m loadtest --record` writes it."""
    with np.load(path, allow_pickle=False) as file:
        names = np.array([*file["versions"], ""], str)  # the last stands for no version
        outcome = file["outcome"]
        good = (outcome == 200) & (file["invalid"] == 0)
        intended, sent, done = (file[name] for name in ("intended", "sent", "done"))
        return Samples(intended, sent, done, outcome, good, file["retry_after"] > 0, names[file["version"]])


def joined(parts: Iterable[Samples]) -> Samples:
    """Return the samples of several clients, in the order of their intended starts."""
    columns = [[getattr(part, field.name) for field in fields(Samples)] for part in parts]
    whole = Samples(*(np.concatenate(column) for column in zip(*columns, strict=True)))
    return whole.where(np.argsort(whole.intended, kind="stable"))


def goodput(samples: Samples, begin: float, end: float) -> float:
    """Return good answers a second that came between `begin` and `end`."""
    return float((samples.good & (samples.done >= begin) & (samples.done < end)).sum() / (end - begin))


def offered(samples: Samples, begin: float, end: float) -> tuple[float, float]:
    """Return the rate intended between `begin` and `end`, and the rate written to sockets in that time."""
    due = samples.between(begin, end)
    in_time = (due.sent > 0) & (due.sent <= end + LAG_LIMIT_MS / 1e3)
    return float(len(due) / (end - begin)), float(in_time.sum() / (end - begin))


def seconds(samples: Samples, begin: float, end: float, width: float = 1.0) -> list[Samples]:
    """Return the arrivals of every whole slot of `width` seconds from `begin` to `end`."""
    edges = begin + width * np.arange(int((end - begin) / width + 1e-6) + 1)
    return [samples.between(left, right) for left, right in pairwise(edges)]
