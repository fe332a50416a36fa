"""C is found with few probes, and is a rate that holds and was confirmed."""

import pytest

from bench.contract import capacity_search


@pytest.mark.parametrize("limit", [3.0, 25.0, 49.0, 170.0, 4321.0])
def test_finds_the_highest_rate_that_holds_within_its_tolerance(limit: float) -> None:
    asked: list[float] = []

    def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = capacity_search.find(holds, lambda rate: True, start=25.0)
    assert limit / capacity_search.CLOSE <= found <= limit
    assert len(asked) < 16


def test_lowers_a_rate_that_is_not_confirmed() -> None:
    asked: list[float] = []

    def confirmed(rate: float) -> bool:
        asked.append(rate)
        return rate <= 90

    found = capacity_search.find(lambda rate: rate <= 100, confirmed, start=25.0)
    assert 90 * capacity_search.STEP_DOWN <= found <= 90
    assert asked == sorted(asked, reverse=True)


def test_service_that_holds_no_rate_has_no_capacity() -> None:
    with pytest.raises(capacity_search.NoCapacity):
        capacity_search.find(lambda rate: False, lambda rate: True, start=25.0)
    with pytest.raises(capacity_search.NoCapacity):
        capacity_search.find(lambda rate: rate <= 100, lambda rate: False, start=25.0)
