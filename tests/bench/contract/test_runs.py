"""Requests sent and outcomes counted are compared over a real service and a real driver."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench.contract import runs
from bench.contract.rig import Client, Plan, Rig
from bench.servers import Server
from models.registry.registry import Registry


def _rig(url: str, out: Path) -> Rig:
    return Rig(Plan(out, 100.0, 1, 1.0), Server("fake", url, 0, 0.0), Registry(out), None, out)  # type: ignore[arg-type]


def test_a_request_of_somebody_else_breaks_the_sum(serve: Callable[..., Any], tmp_path: Path) -> None:
    url = serve().url
    rig = _rig(url, tmp_path)

    def ours() -> dict[str, Any]:
        clients = [Client(rig, "json", 40, 0.5, {}), rig.probe("readyz", "readyz", 20, 0.5)]
        return {"statuses": [client.samples().statuses for client in clients]}

    def theirs() -> dict[str, Any]:
        return {"status": httpx.get(f"{url}/livez").status_code}

    figures = runs.reconciled(rig, ours)
    assert figures["statuses"][1] == {"200": 10}
    assert (figures["sent"], figures["difference"]) == (30, 0)
    assert runs.reconciled(rig, theirs)["difference"] == 1
