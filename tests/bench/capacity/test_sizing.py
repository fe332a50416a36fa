"""A plan carries its load with a machine to spare, fits into memory, and names what is not known."""

import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest

from bench.capacity.costs import BadCosts, Costs
from bench.capacity.sizing import EXACT, LOAD, Demand, plan
from bench.capacity.table import of_plan
from models.training.publish_corpus import FLAT_ROWS

DEMAND = Demand(rate=1000, p99_ms=100, net="gru", rows=8, cores=4, memory_gb=8)


def test_plans_workers_for_seven_tenths_of_their_knee(costs: Costs) -> None:
    found = plan(costs, DEMAND)
    serving = found["serving"]
    assert serving["workers"] == ceil(DEMAND.rate / (LOAD * serving["knee"]))
    assert serving["machines"] == ceil(serving["workers"] / 4) + 1
    assert found["latency_ms"]["p99"] < DEMAND.p99_ms
    assert serving["worker_mb"] == 180
    assert found["limits"]["what"] == "the net"
    assert found["limits"]["traffic_in_gbit"] == pytest.approx(1000 * 8 * 5 * 384 * 4 * 8 / 1e9)


def test_memory_limits_the_workers_of_a_machine(costs: Costs) -> None:
    roomy, tight = plan(costs, DEMAND)["serving"], plan(costs, replace(DEMAND, memory_gb=0.4))["serving"]
    assert (roomy["per_machine"], tight["per_machine"]) == (4, 2)
    assert tight["machines"] == ceil(tight["workers"] / 2) + 1
    with pytest.raises(BadCosts, match="a machine has"):
        plan(costs, replace(DEMAND, memory_gb=0.1))


def test_shards_a_large_index_for_the_fewest_machines(costs: Costs) -> None:
    demand = replace(DEMAND, rate=1000, vectors=10**9, cores=16, memory_gb=64)
    index = plan(costs, demand)["index"]
    assert index["shards"] * index["vectors_per_shard"] >= 10**9
    assert index["per_machine"] * index["worker_mb"] <= 64_000
    assert index["workers"] % index["shards"] == 0
    assert index["is_extrapolated"]
    assert index["raw_gb"] == pytest.approx(1536)


def test_small_corpus_is_one_exact_shard_and_unmeasured_figures_are_named(costs: Costs) -> None:
    found = plan(costs, replace(DEMAND, vectors=24_000))
    index = found["index"]
    assert (index["shards"], index["kind"], index["is_extrapolated"]) == (1, "exact", False)
    rows = {what: (value, why) for what, value, why in of_plan(found)}
    assert rows["GPUs"][0] == "not measured"
    assert "its speed is not measured" in rows["Milvus instead"][1]
    with pytest.raises(BadCosts, match="searching"):
        plan(replace(costs, search=None), replace(DEMAND, vectors=6000))


def test_planning_needs_no_torch_and_knows_when_an_index_is_exact() -> None:
    program = "import sys, bench.capacity.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert EXACT == FLAT_ROWS
