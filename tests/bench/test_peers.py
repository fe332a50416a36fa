"""The peers answer correctly; otherwise a comparison with them would mean nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.load import Workload, WrongAnswers, keep
from bench.peers import bare, echo, naive
from bench.servers import RunningServer
from bench.untrained import draw_contexts
from loadtest.plan import Wire
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net, run_net

DIM = 16
KINDS = pytest.mark.parametrize(("wire", "rows"), [("json", 1), ("octet", 1), ("octet", 3)])


def ask(directory: Path, server: RunningServer, wire: Wire, rows: int, expected: Any) -> int:
    workload = Workload(server, wire, keep(directory, draw_contexts(len(expected), DIM), expected), rows)
    return int(workload.run(rate=100, seconds=0.1, connections=2, min_offered=0)["checked"])


@KINDS
@pytest.mark.parametrize("tuned", [False, True])
def test_naive_answers_as_its_net(tmp_path: Path, peer: Any, tiny_net: Any, wire: Wire, rows: int, tuned: bool) -> None:
    server = peer(naive.create_app(tiny_net, 5, DIM, is_tuned=tuned), "naive", "/octet")
    assert ask(tmp_path, server, wire, rows, run_net(tiny_net, draw_contexts(4, DIM))) == 10


@KINDS
def test_bare_answers_as_its_net(tmp_path: Path, peer: Any, tiny_registry: Registry, wire: Wire, rows: int) -> None:
    version = load_checkpoint(tiny_registry.resolve("primary").path)
    expected = run_net(build_net(version), draw_contexts(4, DIM))
    assert ask(tmp_path, peer(bare.Bare(version), "bare"), wire, rows, expected) == 10


@KINDS
def test_echo_answers_its_constant(tmp_path: Path, peer: Any, wire: Wire, rows: int) -> None:
    server = peer(echo.create_app(DIM), "echo")
    assert ask(tmp_path, server, wire, rows, np.tile(echo.constant(DIM), (4, 1))) == 10


def test_rejects_answers_of_another_net(tmp_path: Path, peer: Any, tiny_net: Any) -> None:
    server = peer(naive.create_app(tiny_net, 5, DIM), "naive", "/octet")
    with pytest.raises(WrongAnswers, match="'invalid': 10"):
        ask(tmp_path, server, "octet", 1, run_net(tiny_net, draw_contexts(4, DIM)) + np.float32(1e-3))
