"""HTTP beside gRPC: the table, and that the calls are what the service answers."""

import numpy as np
import pytest

from bench.load import WrongAnswers
from bench.wires import Calls, to_markdown
from tests.conftest import Running
from tests.fakes import contexts, mean_of


def test_the_table_has_medians_over_rounds() -> None:
    rounds = [
        {("gRPC", 8): {"per_second": 1000.0 * slow, "p50": 1.0, "p99": 2.0, "us": 300.0 * slow}} for slow in (1, 2, 9)
    ]
    assert to_markdown(rounds).splitlines()[2:] == ["| 8 | gRPC | 2000 | 1.00 | 2.00 | 600 |"]


def test_calls_are_counted_and_their_answers_checked(serve) -> None:  # type: ignore[no-untyped-def]
    server: Running = serve(grpc_port=0)
    assert server.app.grpc
    given = contexts(4)
    calls = Calls(server.app.grpc.port, given, mean_of(given))
    calls.warm_up(2)
    figures = calls.measure(2, 0.1)
    assert figures["requests"] >= 2
    assert server.metric("lvm_requests_total", route="grpc:infer", outcome="ok") > figures["requests"]
    with pytest.raises(WrongAnswers):
        Calls(server.app.grpc.port, given, -np.asarray(mean_of(given))).warm_up(1)
