"""The instruments: exact counts, edges where the objectives are, names that promtool likes."""

from __future__ import annotations

import bisect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.metrics import Histogram, Metrics, latency_edges

SLOS = (5.0, 10.0, 25.0, 50.0, 100.0)


def test_edges_are_log_spaced_from_50_us_and_hit_every_objective() -> None:
    edges = latency_edges(SLOS)
    assert edges[0] == 50e-6
    assert edges[-1] == 10
    assert len(edges) == 40
    assert {ms / 1000 for ms in SLOS} <= set(edges)
    assert max(high / low for low, high in itertools.pairwise(edges)) < 2


@given(st.lists(st.floats(1e-3, 1e5), max_size=8, unique=True))
def test_any_objectives_become_edges(slos: list[float]) -> None:
    edges = latency_edges(slos)
    assert {ms / 1000 for ms in slos} <= set(edges)
    assert list(edges) == sorted(set(edges))


@given(st.lists(st.floats(0, 20)))
def test_a_histogram_counts_every_value_once_at_or_below_its_edge(values: list[float]) -> None:
    histogram = Histogram("h", "h", ("l",), latency_edges(SLOS))
    series = histogram.of("x")
    for value in values:
        series.observe(value)
    cumulative = dict(series.buckets())
    ordered = sorted(values)
    for edge in histogram.edges:
        assert cumulative[repr(edge)] == bisect.bisect_right(ordered, edge)
    assert cumulative["+Inf"] == len(values)
    assert series.total == pytest.approx(sum(values))


def test_every_family_has_help_and_the_lvm_prefix() -> None:
    metrics = Metrics(SLOS)
    families = list(metrics.collect())
    assert families
    assert all(family.name.startswith("lvm_") and family.documentation.endswith(".") for family in families)


def test_a_label_set_is_one_series_however_often_it_is_asked_for() -> None:
    metrics = Metrics(SLOS)
    assert metrics.seconds.of("/predict", "total") is metrics.seconds.of("/predict", "total")
