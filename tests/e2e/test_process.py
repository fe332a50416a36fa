"""The main job as a stranger runs it: a real `lvm serve` on what ships, real sockets, real load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from models import checkpoint, corpus
from tests.conftest import LVM, PATIENCE_S, ROOT, Process, until

Start = Callable[..., Process]
EXAMPLE = ROOT / "examples" / "context.json"


class Load:
    """`python -m loadtest` in the background."""

    def __init__(self, url: str, *options: str) -> None:
        command = [sys.executable, "-m", "loadtest", "--url", url, "--json", *options]
        self.popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def report(self) -> dict[str, Any]:
        out, err = self.popen.communicate(timeout=120)
        assert out, err
        report: dict[str, Any] = json.loads(out)
        return report


def test_the_golden_vectors_come_out_as_they_went_in(process: Start) -> None:
    server = process()
    for alias in ("primary", "fallback"):
        known = checkpoint.load(server.registry.resolve(alias).path)
        answer = httpx.post(
            f"{server.url}/predict",
            content=known.golden_context.tobytes(),
            params={"model": alias},
            headers={"content-type": "application/octet-stream", "accept": "application/octet-stream"},
        )
        assert answer.headers["x-model-version"] == known.version
        vectors = np.frombuffer(answer.content, "<f4").reshape(known.golden_vector.shape)
        np.testing.assert_allclose(vectors, known.golden_vector, atol=1e-5)


def test_the_shipped_example_gets_a_unit_vector_and_passages_of_its_article(process: Start) -> None:
    server = process()
    body = json.loads(EXAMPLE.read_text())
    predicted = httpx.post(f"{server.url}/predict", json=body).json()
    assert (predicted["model"], predicted["served_by"]) == ("amn", "primary")
    assert np.linalg.norm(predicted["vector"]) == np.float32(1) or abs(np.linalg.norm(predicted["vector"]) - 1) < 1e-5
    hits = httpx.post(f"{server.url}/retrieve", json=body).json()["results"]
    context = np.asarray(body["context"], np.float32)
    known = corpus.read(server.registry.resolve("retriever").path)
    home = known.article[int(np.argmax(known.vectors @ context[-1]))]
    assert sum(hit["article"] == home for hit in hits) >= 5
    assert all(hit["title"] and hit["text"] for hit in hits)
    assert (known.vectors[[hit["id"] for hit in hits]] @ context.T).max() < 0.999


def test_serving_on_cpu_imports_no_torch(shipped: Path) -> None:
    code = (
        "import sys, service.cli, service.server, models.predictor, models.retriever\n"
        f"from pathlib import Path; root = Path({str(shipped)!r})\n"
        "models.predictor.load(root / 'primary'); models.retriever.load(root / 'retriever')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_promotion_under_load_changes_the_version_without_an_error(process: Start, shipped: Path) -> None:
    server = process(LVM_CONCURRENCY="2048")  # on a slow machine GRU may be too slow for the adaptive limit
    gru = server.registry.resolve("fallback")
    amn = server.registry.resolve("primary")
    load = Load(server.url, "--rate", "300", "--seconds", "6", "--wire", "octet", "--max-error-rate", "0")
    until(lambda: _count(server.url, "ok") > 300, "the load")
    subprocess.run([LVM, "promote", "primary", gru.id], env={"LVM_REGISTRY": str(shipped)}, check=True)
    report = load.report()
    assert report["statuses"] == {"200": report["sent"]}
    assert set(report["versions"]) == {amn.version, gru.version}
    assert sum(report["failures"].values()) == 0


def test_sigterm_under_load_loses_nothing_and_exits_0(process: Start) -> None:
    server = process(LVM_DRAIN_S="1", LVM_CONCURRENCY="2048")
    load = Load(server.url, "--rate", "300", "--seconds", "5", "--wire", "json")
    until(lambda: _count(server.url, "ok") > 300, "the load")
    server.popen.terminate()
    until(lambda: _ready(server.url) == 503, "readiness to go")
    assert server.popen.wait(PATIENCE_S) == 0
    report = load.report()
    assert report["failures"]["lost"] == 0, report["lost_kinds"]
    assert report["failures"]["timeout"] == report["failures"]["invalid"] == 0
    assert report["failures"]["refused"] > 0
    assert set(report["statuses"]) == {"200"}


def test_outcomes_counted_are_the_requests_sent(process: Start) -> None:
    server = process()
    report = Load(server.url, "--rate", "500", "--seconds", "2", "--wire", "octet").report()
    assert _count(server.url, "ok") == report["sent"] + report["warmup_sent"]


def test_a_second_server_on_the_same_port_says_so(process: Start, shipped: Path) -> None:
    port = process().url.rpartition(":")[2]
    done = subprocess.run(
        [LVM, "serve", "--port", port], env={"LVM_REGISTRY": str(shipped)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def _ready(url: str) -> int:
    try:
        return httpx.get(f"{url}/readyz").status_code
    except httpx.TransportError:
        return 0


def _count(url: str, outcome: str) -> float:
    time.sleep(0.05)
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    wanted = f'lvm_requests_total{{route="/predict",outcome="{outcome}"}}'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))
