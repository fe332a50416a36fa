"""Instruments: exact counts, an edge at each objective, and text that strict parsers accept."""

from __future__ import annotations

import bisect
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from service.telemetry.metrics import Histogram, Metrics, latency_edges
from service.telemetry.shared_memory import MetricValues
from tests.scraping import scrape

SLOS = (5.0, 10.0, 25.0, 50.0, 100.0)


def test_edges_are_log_spaced_from_50_us_and_include_every_objective() -> None:
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


def samples(text: str, parse: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in parse(text) for s in family.samples}


@given(st.lists(st.floats(0, 20)))
def test_a_histogram_counts_each_value_at_or_below_its_edge(values: list[float]) -> None:
    histogram = Histogram("h", "h", ("l",), memory=MetricValues(), edges=latency_edges(SLOS))
    for value in values:
        histogram.labels("x").observe(value)
    histogram.labels("x")
    found = samples("\n".join(histogram.lines({})), text_string_to_metric_families)
    ordered = sorted(values)
    for edge in histogram.edges:
        assert found["h_bucket", (("l", "x"), ("le", repr(edge)))] == bisect.bisect_right(ordered, edge)
    assert found["h_bucket", (("l", "x"), ("le", "+Inf"))] == found["h_count", (("l", "x"),)] == len(values)
    assert found["h_sum", (("l", "x"),)] == pytest.approx(sum(values))


def test_both_formats_parse_strictly_to_the_same_samples() -> None:
    metrics = Metrics(SLOS)
    metrics.requests.inc('odd "label"\nwith\\all', "ok")
    metrics.seconds.labels("/predict", "total").observe(0.01)
    metrics.model.label_sets = [("primary", "amn", "v", "s", "r")]
    classic, classic_type = scrape(metrics)
    modern, modern_type = scrape(metrics, "application/openmetrics-text; version=1.0.0")
    assert classic_type.startswith("text/plain")
    assert modern_type.startswith("application/openmetrics-text")
    ours = [
        {key: value for key, value in samples(text.decode(), parse).items() if key[0].startswith("lvm_")}
        for text, parse in ((classic, text_string_to_metric_families), (modern, parse_openmetrics))
    ]
    assert ours[0] == ours[1]
    assert ours[0]["lvm_requests_total", (("outcome", "ok"), ("route", 'odd "label"\nwith\\all'))] == 1


def test_a_scrape_lets_requests_run_before_each_family() -> None:
    metrics = Metrics(SLOS)
    assert sum(1 for _ in metrics.scrape()) > len([*metrics.instruments()])


def test_openmetrics_alone_shows_the_latest_exemplar_of_each_bucket() -> None:
    histogram = Histogram("h", "h.", ("l",), memory=MetricValues(), edges=(0.1, 1.0))
    for value, trace in ((0.05, "aa"), (0.07, "bb"), (1.0, "cc"), (7.0, "dd")):
        histogram.labels("x").observe(value)
        histogram.labels("x").add_exemplar(value, trace, 1700000000.1234)
    [family] = parse_openmetrics("\n".join([*histogram.lines({}, openmetrics=True), "# EOF\n"]))
    shown = {s.labels["le"]: s.exemplar for s in family.samples if s.name == "h_bucket"}
    assert {le: (e.labels, e.value, float(e.timestamp)) for le, e in shown.items()} == {
        "0.1": ({"trace_id": "bb"}, 0.07, 1700000000.123),
        "1.0": ({"trace_id": "cc"}, 1.0, 1700000000.123),
        "+Inf": ({"trace_id": "dd"}, 7.0, 1700000000.123),
    }
    assert "#" not in "".join(line for line in histogram.lines({}) if not line.startswith("#"))


def test_edges_below_zero_parse_strictly_in_both_formats() -> None:
    metrics = Metrics(SLOS)
    metrics.shadow_extra_seconds.labels().observe(-0.01)
    classic, modern = (scrape(metrics, accept)[0].decode() for accept in ("", "application/openmetrics-text"))
    assert samples(classic, text_string_to_metric_families)["lvm_shadow_extra_seconds_sum", ()] == -0.01
    assert samples(modern, parse_openmetrics)["lvm_shadow_extra_seconds_bucket", (("le", "+Inf"),)] == 1


def test_every_family_has_help_and_the_lvm_prefix() -> None:
    instruments = list(Metrics(SLOS).instruments())
    assert instruments
    assert all(made.name.startswith("lvm_") and made.help_text.endswith(".") for made in instruments)


def test_the_same_labels_return_the_same_series() -> None:
    metrics = Metrics(SLOS)
    assert metrics.seconds.labels("/predict", "total") is metrics.seconds.labels("/predict", "total")
