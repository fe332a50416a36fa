"""The cost model interpolates between measured points, extrapolates beyond them, and survives a file."""

from pathlib import Path

import pytest

from bench.capacity.costs import BadCosts, Costs, Curve, Line


def test_line_goes_through_points_that_lie_on_one() -> None:
    line = Line.through({1: 3.0, 8: 10.0, 32: 34.0})
    assert line == pytest.approx((2.0, 1.0))
    assert line.at(100) == pytest.approx(102)


def test_line_has_no_negative_cost() -> None:
    assert Line.through({1: 1.0, 10: 20.0}) == pytest.approx((0.0, 1.5))
    assert Line.through({1: 2.0, 10: 1.0}) == pytest.approx((1.5, 0.0))


def test_curve_is_linear_between_points_and_proportional_beyond() -> None:
    curve = Curve((1, 8, 128), (2.0, 9.0, 129.0))
    assert [curve.at(count) for count in (1, 2, 8, 68, 128, 256)] == [2.0, 3.0, 9.0, 69.0, 129.0, 258.0]
    assert Curve.through([(8, 9.0), (128, 129.0), (1, 2.0)]) == curve


def test_reads_what_it_wrote(costs: Costs, tmp_path: Path) -> None:
    costs.write(tmp_path / "costs.json")
    again = Costs.read(tmp_path / "costs.json")
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "costs.json").read_bytes()
    assert again.net("gru", "octet")[0].batch.at(8) == 0.006


def test_shipped_costs_say_how_they_were_measured() -> None:
    shipped = Costs.read()
    assert {"amn", "gru"} <= shipped.nets.keys()
    assert shipped.command.startswith("python -m bench.capacity")
    assert shipped.search


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nets": {"amn": {}}}'])
def test_rejects_a_file_that_is_not_a_cost_model(text: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(BadCosts):
        Costs.read(tmp_path / "costs.json")


def test_rejects_a_net_or_wire_that_was_not_measured(costs: Costs) -> None:
    with pytest.raises(BadCosts, match="available: gru, amn"):
        costs.net("lstm", "octet")
    with pytest.raises(BadCosts, match="available: octet, json"):
        costs.net("amn", "smoke signals")  # type: ignore[arg-type]
