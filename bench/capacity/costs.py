"""The cost model: what requests, batches and searches take, as measured on one machine and kept in a JSON file."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from loadtest.plan import Wire

SHIPPED = Path(__file__).with_name("costs.json")


class BadCosts(ValueError):
    """The file is not a cost model, or has no such net or wire."""


class Line(NamedTuple):
    """A cost that grows with a count: seconds once, and seconds each."""

    once_s: float
    each_s: float = 0.0

    def at(self, count: float) -> float:
        """Return the seconds for `count`."""
        return self.once_s + self.each_s * count

    @classmethod
    def through(cls, points: Mapping[float, float]) -> Self:
        """Return the line of least squares of relative errors through seconds by count; neither part is negative."""
        counts, seconds = np.array(list(points)), np.array(list(points.values()))
        once, each = np.linalg.lstsq(np.stack([1 / seconds, counts / seconds], axis=1), np.ones(len(seconds)))[0]
        if once < 0:
            return cls(0.0, float(np.mean(seconds / counts)))
        return cls(float(once), float(each)) if each > 0 else cls(float(np.mean(seconds)))


class Curve(NamedTuple):
    """A cost measured at some counts: straight lines between them, in proportion beyond the last."""

    counts: Sequence[int | float]
    seconds: Sequence[float]

    def at(self, count: float) -> float:
        """Return the seconds for `count`, at least those of the first."""
        place = bisect_left(self.counts, count)
        if place == len(self.counts):
            return self.seconds[-1] * count / self.counts[-1]
        if place == 0:
            return self.seconds[0]
        (left, right), (low, high) = self.counts[place - 1 : place + 1], self.seconds[place - 1 : place + 1]
        return low + (high - low) * (count - left) / (right - left)

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Self:
        """Return the curve through pairs of a count and its seconds, in any order."""
        counts, seconds = zip(*sorted(points), strict=True)
        return cls(counts, seconds)


@dataclass(frozen=True)
class NetCosts:
    """A net in one process on one core.

    `batch` has the seconds of a batch by rows, on the event loop if `is_inline`; `requests` by wire the seconds of the
    event loop for a request by its rows; `mb` is the memory of a loaded version.
    """

    batch: Curve
    is_inline: bool
    requests: Mapping[Wire, Line]
    dim: int
    length: int
    mb: float


@dataclass(frozen=True)
class SearchCosts:
    """Retrieval at D = `dim`: seconds on one core, and bytes in memory and on disk for each vector.

    `request_s` is a `/retrieve` of a query but for the search; `exact` goes by vectors, `approximate` by their
    square root: there are twice as many lists as that, and each has half as many rows.
    """

    dim: int
    request_s: float
    exact: Line
    approximate: Line
    measured: Sequence[int]
    exact_bytes: float
    approximate_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Costs:
    """What one machine spends; `process_mb` is a serving process without nets or vectors."""

    machine: Mapping[str, str]
    command: str
    process_mb: float
    nets: Mapping[str, NetCosts]
    search: SearchCosts | None = None

    def net(self, name: str, wire: Wire) -> tuple[NetCosts, Line]:
        """Return a net and what its requests cost on a wire; raises `BadCosts`."""
        if name not in self.nets:
            raise BadCosts(f"{name!r} was not measured; available: {', '.join(self.nets)}")
        if wire not in self.nets[name].requests:
            raise BadCosts(f"{wire!r} was not measured; available: {', '.join(self.nets[name].requests)}")
        return self.nets[name], self.nets[name].requests[wire]

    def write(self, path: Path) -> None:
        """Write the model as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path = SHIPPED) -> Self:
        """Read what `write` wrote.

        Raises:
            BadCosts: it is not a cost model.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise BadCosts(f"{path}: not a cost model: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise BadCosts(f"{path}: not a cost model: {place}: {first['msg']}") from error
