"""Counters, gauges and histograms, and their text in a scrape.

Each number has one writer, so no locks are needed. `prometheus_client` offers the same, but its histograms search
their buckets one by one under a lock, and it formats every line again in each scrape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import ClassVar, Generic, Self, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from service.telemetry.shared_memory import Key, MetricValues

Child = TypeVar("Child")
Labels = tuple[str, ...]
# The numbers of the other processes.
Others = Mapping[Key, list[Sequence[float]]]
# Makes one value of the values of several processes.
Join = Callable[[Iterable[float]], float]
PROCESS_JOINS: Mapping[str, Join] = {"process_start_time_seconds": min, "python_info": max}


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _braces(names: Labels, values: Labels, *more: str) -> str:
    """Return the labels of a sample as text, `more` at the end."""
    pairs = [f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True)]
    return "{" + ",".join([*pairs, *more]) + "}" if pairs or more else ""


def _exemplar(trace_id: str, value: float, now: float) -> str:
    return f' # {{trace_id="{trace_id}"}} {value!r} {now:.3f}'


@dataclass(eq=False)
class Family(ABC):
    """A name with its help text and its samples."""

    kind: ClassVar[str]
    name: str
    help_text: str
    label_names: Labels = ()

    @abstractmethod
    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the lines of a scrape, with the numbers of `others` joined in."""

    def _header(self, name: str) -> Iterator[str]:
        yield f"# HELP {name} {self.help_text}"
        yield f"# TYPE {name} {self.kind}"


@dataclass(eq=False)
class Info(Family):
    """Facts about this process: a sample of value 1 for each of `label_sets`."""

    kind = "gauge"
    label_sets: list[Labels] = field(default_factory=list)

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the lines of a scrape, the same in both formats."""
        yield from self._header(self.name)
        for values in self.label_sets:
            yield f"{self.name}{_braces(self.label_names, values)} 1.0"


@dataclass(eq=False)
class Levels(Family):
    """Levels by label values, the same in every process; `values` may be replaced."""

    kind = "gauge"
    values: dict[Labels, float] = field(default_factory=dict)

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the lines of a scrape, the same in both formats."""
        yield from self._header(self.name)
        for labels, value in self.values.items():
            yield f"{self.name}{_braces(self.label_names, labels)} {value!r}"


@dataclass(eq=False)
class Instrument(Family, Generic[Child]):
    """A family whose numbers are in `memory`, with a child for each set of label values."""

    memory: MetricValues = field(kw_only=True)

    def __post_init__(self) -> None:
        self._numbers = self.memory.values
        self._children: dict[Labels, Child] = {}

    def labels(self, *values: str) -> Child:
        """Return the child of these label values. The first call creates it, and it is shown from then on.

        If the memory is full, what it counts is not shown.
        """
        child = self._children.get(values)
        if child is None:
            child = self._create(values)
            if self.memory.has((self.name, *values)):
                self._children[values] = child
        return child

    def precreate(self, *label_values: Iterable[str]) -> Self:
        """Show every combination of label values from the start, so that the first count is an increase."""
        for values in product(*label_values):
            self.labels(*values)
        return self

    @abstractmethod
    def _create(self, values: Labels) -> Child: ...


@dataclass(eq=False)
class Counter(Instrument[int]):
    """Counts by label values. A child is the offset of its number in `memory`.

    `join` makes one number of the numbers of several processes.
    """

    kind = "counter"
    # exact, so that it does not depend on which process adds: a counter that falls by a rounding error looks reset
    join: Join = field(default=math.fsum, kw_only=True)

    def inc(self, *values: str) -> None:
        """Count one."""
        offset = self._children.get(values)
        self._numbers[self.labels(*values) if offset is None else offset] += 1

    def add(self, count: int, *values: str) -> None:
        """Count several."""
        self._numbers[self.labels(*values)] += count

    def set(self, value: float, *values: str) -> None:
        """Overwrite the number."""
        self._numbers[self.labels(*values)] = value

    def value(self, *values: str) -> float:
        """Return the number of this process."""
        return self._numbers[self.labels(*values)]

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the lines of a scrape. In OpenMetrics the name of a counter's family lacks `_total`."""
        sample = self.name + ("_total" if self.kind == "counter" else "")
        yield from self._header(self.name if openmetrics else sample)
        for values, number in self.totals(others).items():
            yield f"{sample}{_braces(self.label_names, values)} {number!r}"

    def totals(self, others: Others) -> dict[Labels, float]:
        """Return the numbers by label values, with those of `others` joined in."""
        found: dict[Labels, float] = {}
        for values, offset in self._children.items():
            theirs = [numbers[0] for numbers in others.get((self.name, *values), ())]
            found[values] = self.join([self._numbers[offset], *theirs])
        return found

    def _create(self, values: Labels) -> int:
        return self.memory.allocate((self.name, *values), 1)


class Gauge(Counter):
    """Levels by label values."""

    kind = "gauge"

    def dec(self, *values: str) -> None:
        """Count one less than `inc` has counted."""
        self._numbers[self._children[values]] -= 1

    def reset(self) -> dict[Labels, float]:
        """Set every level to the neutral element of `join`; return the levels that were not 0."""
        levels = {values: self._numbers[offset] for values, offset in self._children.items()}
        for values in levels:
            self.set(math.inf if self.join is min else 0.0, *values)
        return {values: level for values, level in levels.items() if level}


@dataclass(eq=False)
class Share(Family):
    """By the first label of a counter: how many counts of one value of its last label there are to one of another."""

    kind = "gauge"
    counter: Counter = field(kw_only=True)
    part: str = field(kw_only=True)
    whole: str = field(kw_only=True)

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the lines of a scrape, the same in both formats."""
        yield from self._header(self.name)
        totals = self.counter.totals(others)
        for first, last in totals:
            if last == self.whole and totals[first, last]:
                share = totals.get((first, self.part), 0.0) / totals[first, last]
                yield f"{self.name}{_braces(self.label_names, (first,))} {share!r}"


@dataclass(eq=False)
class Histogram(Instrument["Series"]):
    """Histograms by label values, with the same inclusive upper `edges`."""

    kind = "histogram"
    edges: Sequence[float] = field(kw_only=True)

    def observe_each(self, series: Mapping[str, Series], values: Mapping[str, float]) -> None:
        """Count one value in each of its `series` that `values` names, as `Series.observe` does."""
        numbers, edges, to_sum = self._numbers, self.edges, len(self.edges) + 1
        for name, value in values.items():
            offset = series[name].offset
            numbers[offset + bisect_left(edges, value)] += 1
            numbers[offset + to_sum] += value

    def lines(self, others: Others, *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the lines of a scrape. Only OpenMetrics has exemplars."""
        yield from self._header(self.name)
        for values, series in self._children.items():
            yield from series.lines(others.get((self.name, *values), ()), openmetrics=openmetrics)

    def totals(self, others: Others) -> dict[Labels, list[float]]:
        """Return the numbers by label values, with those of `others` added: a count for each bucket, then the sum."""
        return {
            values: series.totals(others.get((self.name, *values), ())) for values, series in self._children.items()
        }

    def _create(self, values: Labels) -> Series:
        return Series(self, values)


class Series:
    """The histogram of one set of label values: a count for each bucket, then the sum of all values."""

    __slots__ = ("_edges", "_exemplars", "_numbers", "_prefixes", "_size", "_sum", "_totals", "offset")

    def __init__(self, histogram: Histogram, values: Labels) -> None:
        name, names, memory = histogram.name, histogram.label_names, histogram.memory
        self._edges = histogram.edges
        # A bucket for each edge, one for what is greater, and the sum.
        self._size = len(self._edges) + 2
        self._numbers = memory.values
        self.offset = memory.allocate((name, *values), self._size)
        self._sum = self.offset + self._size - 1
        self._exemplars: dict[int, tuple[str, float, float]] = {}
        # The beginnings of the lines, made once because a scrape holds up the event loop.
        limits = [f'le="{limit}"' for limit in (*map(repr, self._edges), "+Inf")]
        self._prefixes = [f"{name}_bucket{_braces(names, values, limit)}" for limit in limits]
        self._totals = [f"{name}_{total}{_braces(names, values)}" for total in ("count", "sum")]

    def observe(self, *values: float) -> None:
        """Count values in their buckets. A bucket includes its upper edge."""
        for value in values:
            self._numbers[self.offset + bisect_left(self._edges, value)] += 1
            self._numbers[self._sum] += value

    def add_exemplar(self, value: float, trace_id: str, now: float) -> None:
        """Remember a trace that had `value` at `now` (seconds since 1970). A bucket keeps its latest."""
        self._exemplars[bisect_left(self._edges, value)] = trace_id, value, now

    def totals(self, others: Sequence[Sequence[float]]) -> list[float]:
        """Return the counts and the sum, with the numbers of `others` added."""
        ours = self._numbers[self.offset : self.offset + self._size]
        # a process of another release may have other edges
        others = [each for each in others if len(each) == self._size]
        return [*map(math.fsum, zip(ours, *others, strict=True))] if others else [*ours]

    def lines(self, others: Sequence[Sequence[float]], *, openmetrics: bool = False) -> Iterator[str]:
        """Yield the cumulative buckets, the count and the sum, with the numbers of `others` added."""
        *counts, total = self.totals(others)
        exemplars = self._exemplars if openmetrics else {}
        count = 0.0
        for place, (prefix, count) in enumerate(zip(self._prefixes, accumulate(counts), strict=True)):
            yield f"{prefix} {count:.0f}{_exemplar(*exemplars[place]) if place in exemplars else ''}"
        # OpenMetrics allows neither count nor sum if an edge is below 0.
        if not openmetrics or self._edges[0] >= 0:
            yield f"{self._totals[0]} {count:.0f}"
            yield f"{self._totals[1]} {total!r}"


class ProcessInstruments:
    """Memory, processor time and descriptors of a process, as `prometheus_client` measures them.

    The numbers are in `memory`, so a scrape shows the sum of several workers. A process continues the counts of the
    last one in its slot.
    """

    def __init__(self, memory: MetricValues) -> None:
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._inherited: dict[tuple[str, Labels], float] = {}
        self.families: dict[str, Counter] = {}
        for family in self._registry.collect():
            labels = tuple(family.samples[0].labels) if family.samples else ()
            kind = Counter if family.type == "counter" else Gauge
            join = PROCESS_JOINS.get(family.name, math.fsum)
            self.families[family.name] = kind(family.name, family.documentation, labels, memory=memory, join=join)

    def update(self) -> None:
        """Measure the process."""
        for family in self._registry.collect():
            instrument = self.families[family.name]
            for sample in family.samples:
                values = tuple(sample.labels.values())
                instrument.set(self._inherited_value(instrument, values) + sample.value, *values)

    def _inherited_value(self, instrument: Counter, values: Labels) -> float:
        """Return the count that the last process in this slot has left."""
        if isinstance(instrument, Gauge):
            return 0.0
        return self._inherited.setdefault((instrument.name, values), instrument.value(*values))
