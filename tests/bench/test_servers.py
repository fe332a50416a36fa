"""A server joins once it responds; otherwise the reason is reported and nothing of it is left running."""

import importlib.util
import os
import select
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report, targets
from bench.compare import FIGURES, compare
from bench.peers import LEFT_OUT, PEERS
from bench.servers import ECHO, NAIVE, SERVICE, Launch, describe, echo, launched, peers, responding

DIM = 16
HERE = Path(sys.prefix)


def test_every_peer_exists_and_starts_from_its_own_environment(tmp_path: Path) -> None:
    for launch, peer in zip(peers(tmp_path / "venv", tmp_path / "v"), PEERS.values(), strict=True):
        assert launch.command == (str(tmp_path / "venv/bin/python"), "-m", *peer.command)
        assert launch.environment["BENCH_VERSION"] == str(tmp_path / "v")
        module = next(word.partition(":")[0] for word in peer.command if word.startswith("bench.peers."))
        assert importlib.util.find_spec(module)


def test_describes_installed_and_missing_peers() -> None:
    described = describe(HERE)
    assert described["measured"].keys() == PEERS.keys()
    assert described["measured"]["mosec"][0] == "mosec is not installed"
    assert described["left_out"] == LEFT_OUT


def python(name: str, script: str, ready: str = "/readyz") -> Launch:
    return Launch(name, (sys.executable, "-c", script), os.environ, ready=ready)


def test_runs_servers_that_respond_and_names_the_others(tmp_path: Path) -> None:
    hollow = (
        "import sys; from http.server import HTTPServer, SimpleHTTPRequestHandler as Handler;"
        "HTTPServer(('127.0.0.1', int(sys.argv[-1])), Handler).serve_forever()"
    )
    launches = (
        python("silent", "raise SystemExit('no net')"),
        python("hollow", hollow, "/"),
        Launch("absent", (str(tmp_path / "python"),), os.environ),
        echo(DIM),
    )
    failures: dict[str, str] = {}
    with responding(launches, DIM, tmp_path, failures) as servers:
        assert [server.name for server in servers] == [ECHO]
    assert failures.keys() == {"silent", "hollow", "absent"}
    assert "no net" in failures["silent"]
    assert "501" in failures["hollow"]


def test_stops_the_children_of_a_server(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "child")
    script = (
        f"import subprocess; subprocess.Popen('exec sleep 600 > {tmp_path}/child', shell=True);"
        f"import sys; sys.argv[1:1] = ['--dim', '{DIM}']; from bench.peers.echo import main; main()"
    )
    with launched(python("parent", script), tmp_path):
        child = (tmp_path / "child").open("rb")
    with child:
        assert select.select([child], [], [], 30)[0], "the pipe ends when its writer does"


def measured(server: str, per_second: float) -> dict[str, Any]:
    figures = dict.fromkeys(FIGURES, 1e3 / per_second) | {"per_second": per_second}
    return {"server": server, "wire": "json", "rows": 1, "connections": 32, **figures}


@pytest.fixture
def cell() -> dict[str, Any]:
    speeds = {SERVICE: 60.0, NAIVE: 10.0, ECHO: 90.0, "mosec": 20.0, "mosec, unbatched": 30.0, "litserve": 5.0}
    return compare(("json", 1, 32), [measured(*each) for each in speeds.items()])


def test_compares_with_the_best_variant_of_a_peer(cell: dict[str, Any]) -> None:
    assert cell["strongest"]["mosec"]["per_second"] == "mosec, unbatched"
    assert {peer: ratio["per_second"]["median"] for peer, ratio in cell["ratios"].items()} == {
        "naive": 6.0, "echo": pytest.approx(2 / 3), "mosec": 2.0, "litserve": 12.0,
    }  # fmt: skip


def test_report_has_every_peer_and_names_the_missing_ones(cell: dict[str, Any]) -> None:
    closed = {"generator": "a test", "apart": 0.0, "cells": [cell], "stages": []}
    figures: dict[str, Any] = {"machine": {}, "plan": {}, "failures": {"bentoml": "no such module"}, "closed": closed}
    figures["peers"] = {"measured": {"mosec": ("mosec==1", "-m mosec")}, "left_out": {"Ray Serve": "is a cluster"}}
    judged = [target.judge(figures) for target in targets.TARGETS]
    text = report.to_markdown({**figures, "targets": judged})
    assert "throughput / litserve | throughput / mosec" in text
    assert "**bentoml failed, its figures are left out:** no such module" in text
    assert "Ray Serve, which is a cluster" in text
    assert {row["name"]: row["is_met"] for row in judged}["json, 32 connection(s): throughput / mosec"] is True
