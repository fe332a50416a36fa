"""Requests sent and outcomes counted are compared over a real service and a real load test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench.contract import runs
from bench.contract.harness import ContractOptions, Fixtures, Harness
from bench.servers import RunningServer
from models.registry.registry import Registry
from tests.conftest import PATIENCE_S


def test_request_of_another_client_breaks_the_sum(serve: Callable[..., Any], tmp_path: Path) -> None:
    url = serve().url
    fixtures = Fixtures(Registry(tmp_path), None, tmp_path)  # type: ignore[arg-type]
    harness = Harness(ContractOptions(tmp_path, 100.0, 1, 1.0), RunningServer("fake", url, 0, 0.0), fixtures)

    def ours() -> dict[str, Any]:
        loads = [harness.start("json", 40, 0.5), harness.probe("readyz", "readyz", 20, 0.5)]
        return {"statuses": [load.samples().statuses for load in loads]}

    def theirs() -> dict[str, Any]:
        return {"status": httpx.get(f"{url}/livez", timeout=PATIENCE_S).status_code}

    figures = runs.reconciled(harness, ours)
    assert figures["statuses"][1] == {"200": 10}
    assert (figures["sent"], figures["difference"]) == (30, 0)
    assert runs.reconciled(harness, theirs)["difference"] == 1
