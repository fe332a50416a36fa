"""A cost model made up: round numbers."""

import pytest

from bench.capacity.costs import Costs, Curve, Line, NetCosts, SearchCosts


@pytest.fixture
def costs() -> Costs:
    wires = {"octet": Line(0.0001, 0.00001), "json": Line(0.0001, 0.00006)}
    gru = NetCosts(Curve((1, 8, 128), (0.002, 0.006, 0.080)), False, wires, 384, 5, 100.0)
    amn = NetCosts(Curve((1, 128), (0.0001, 0.0024)), True, wires, 384, 5, 20.0)
    search = SearchCosts(384, 0.0002, Line(0.0, 1e-7), Line(0.0, 1e-6), (6000, 100_000), 1800.0, 64.0, 768.0)
    machine = {"processor": "a machine", "date": "a day"}
    return Costs(machine, "a command", 80.0, {"gru": gru, "amn": amn}, search)
