"""The peers answer right, or beating them would mean nothing."""

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.answers import checker
from bench.client import Tally, run
from bench.peers import echo, naive
from bench.traffic import exchange_of, prepare, read
from bench.versions import draw
from loadtest.plan import Wire
from models.runtimes.torch import run_net

DIM = 16


def errors_of(tmp_path: Path, server: Any, wire: Wire, rows: int, expected: Any) -> int:
    traffic = prepare(tmp_path, server, exchange_of(wire, DIM, rows), draw(len(expected), DIM), expected)
    assert traffic.expected
    tally = Tally(read(traffic.requests), checker(traffic.kind, np.load(traffic.expected)), 1, math.inf, 4)
    figures = asyncio.run(run(server.url, tally, 2))
    assert figures["checked"] == 4
    return int(figures["errors"])


@pytest.mark.parametrize(("wire", "rows"), [("json", 1), ("octet", 1), ("octet", 3)])
@pytest.mark.parametrize("tuned", [False, True])
def test_naive_answers_as_its_net(tmp_path: Path, peer: Any, tiny_net: Any, wire: Wire, rows: int, tuned: bool) -> None:
    server = peer(naive.create_app(tiny_net, 5, DIM, is_tuned=tuned), "naive", "/octet")
    assert errors_of(tmp_path, server, wire, rows, run_net(tiny_net, draw(4, DIM))) == 0


@pytest.mark.parametrize(("wire", "rows"), [("json", 1), ("octet", 1), ("octet", 3)])
def test_echo_answers_its_constant(tmp_path: Path, peer: Any, wire: Wire, rows: int) -> None:
    server = peer(echo.create_app(DIM), "echo")
    assert errors_of(tmp_path, server, wire, rows, np.tile(echo.constant(DIM), (4, 1))) == 0


def test_an_answer_of_another_net_is_noticed(tmp_path: Path, peer: Any, tiny_net: Any) -> None:
    server = peer(naive.create_app(tiny_net, 5, DIM), "naive", "/octet")
    assert errors_of(tmp_path, server, "octet", 1, run_net(tiny_net, draw(4, DIM)) + np.float32(1e-3)) == 4
