"""Invalid plans and scenarios are rejected; flags, steps and multiples combine."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from loadtest.plan import SCENARIOS, Plan, PlanError, make_plan, read_scenario

URL = "http://localhost:1"
SMALL = """
[two]
rate = 100
steps = [
    { name = "low", times = 0.5, seconds = 2, wire = "octet" },
    { name = "high", rate = 7, seconds = 1, min_goodput_times = 0.8 },
]
[typo]
rate = 1
steps = [{ seconds = 1, max_p99 = 3 }]
[empty]
rate = 1
[both]
rate = 1
steps = [{ seconds = 1, rate = 1, times = 2 }]
"""


@pytest.fixture
def scenarios(tmp_path: Path) -> Path:
    path = tmp_path / "scenarios.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0.0},
        {"seconds": -1.0},
        {"rate": float("nan")},
        {"rate": 0.1},
        {"connections": 0},
        {"rows": 2, "route": "retrieve"},
        {"url": "ftp://host"},
        {"url": "http://"},
        {"url": "localhost:8000"},
        {"wire": "xml"},
        {"arrivals": "bursty"},
        {"headers": (("A", "b\r\nC: d"),)},
        {"name": "../up"},
        {"warmup": -1.0},
        {"rate": "fast"},
        {"speed": 3},
        {"arrivals": "closed"},
        {"check_every": 0},
        {"route": "retrieve", "answers": "a.npy"},
    ],
)
def test_rejects_invalid_plan(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        make_plan({"url": URL, "rate": 1.0, "seconds": 1.0, **wrong})


def test_closed_step_has_connections_and_no_rate(tmp_path: Path) -> None:
    steps = '{ name = "a", arrivals = "closed", connections = 4, seconds = 1 }, { name = "b", seconds = 1 }'
    (tmp_path / "s.toml").write_text(f"[both]\nrate = 7\nsteps = [{steps}]", encoding="utf-8")
    closed, opened = read_scenario("both", {"url": URL, "rate": 9.0}, tmp_path / "s.toml")
    assert (closed.is_closed, closed.rate, closed.connections) == (True, 0.0, 4)
    assert (opened.is_closed, opened.rate) == (False, 9.0)


def test_report_of_a_plan_hides_secret_headers() -> None:
    plan = Plan(url=URL, rate=1, seconds=1, headers=(("Authorization", "Bearer x"), ("X-A", "b")))
    assert plan.echo()["headers"] == {"Authorization": "***", "X-A": "b"}


def test_steps_multiply_the_base_rate_or_set_their_own(scenarios: Path) -> None:
    low, high = read_scenario("two", {"url": URL, "wire": "json"}, scenarios)
    assert (low.rate, low.wire, low.min_goodput) == (50.0, "octet", None)
    assert (high.rate, high.wire, high.min_goodput) == (7, "json", 80.0)


def test_rate_flag_replaces_the_base_rate(scenarios: Path) -> None:
    low, high = read_scenario("two", {"url": URL, "rate": 10.0}, scenarios)
    assert (low.rate, high.rate, high.min_goodput) == (5.0, 7, 8.0)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("three", "available: two"), ("typo", "max_p99"), ("empty", "no steps"), ("both", "rate or times")],
)
def test_rejects_invalid_scenario(scenarios: Path, name: str, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        read_scenario(name, {"url": URL}, scenarios)


def test_rejects_invalid_toml(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[", encoding="utf-8")
    with pytest.raises(PlanError, match=r"bad\.toml"):
        read_scenario("smoke", {"url": URL}, tmp_path / "bad.toml")


@pytest.mark.parametrize("name", tomllib.loads(SCENARIOS.read_text(encoding="utf-8")))
def test_every_shipped_scenario_can_be_run(name: str) -> None:
    plans = read_scenario(name, {"url": URL})
    assert len({plan.name for plan in plans}) == len(plans)
