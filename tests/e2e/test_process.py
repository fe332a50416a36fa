"""The main job as a stranger runs it: a real `lvm serve` on what ships, real sockets, real load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import onnx
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from models.registry import manifest
from models.registry.checkpoint import load_checkpoint
from models.retrieval.corpus import read_corpus
from service.processes.sockets import bind
from tests.conftest import LVM, PATIENCE_S, ROOT, SHIPPED, Process, until
from tests.fakes import octets_of

Start = Callable[..., Process]
JSON = "application/json"
EXAMPLE = ROOT / "examples" / "context.json"


class Callers:
    """Threads that each send a request as soon as the last is answered, until they are stopped or refused a connection.

    Every other thread opens a connection for each request.
    """

    def __init__(self, url: str, threads: int = 4) -> None:
        self.answers: list[tuple[int, str]] = []
        self.lost: list[httpx.HTTPError] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, bool(n % 2))) for n in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def count(self, version: str) -> int:
        return sum(each == version for _, each in list(self.answers))

    def _ask(self, url: str, is_new_each_time: bool) -> None:
        headers = {"content-type": JSON, **({"connection": "close"} if is_new_each_time else {})}
        with httpx.Client(base_url=url, timeout=PATIENCE_S, headers=headers) as http:
            while not self._stopped.is_set():
                try:
                    answer = http.post("/predict", content=EXAMPLE.read_bytes())
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    self.lost.append(error)
                    return
                self.answers.append((answer.status_code, answer.headers.get("x-model-version", "")))


class Load:
    """`python -m loadtest` in the background."""

    def __init__(self, url: str, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "loadtest", "--url", url, "--json", *options]
        env = {**os.environ, **environment}
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def report(self) -> dict[str, Any]:
        out, err = self.popen.communicate(timeout=PATIENCE_S)
        assert out, err
        report: dict[str, Any] = json.loads(out)
        return report


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Serve what ships to the tests that change nothing; in the end it exits with 0."""
    home = tmp_path_factory.mktemp("server")
    root = Path(shutil.copytree(SHIPPED, home / "lvm", symlinks=True))
    started = Process(root, home / "log", LVM_DRAIN_S="0.1")
    try:
        yield started
        assert started.stop() == 0
    finally:
        started.popen.kill()
        started.popen.wait()


def test_the_golden_vectors_come_out_as_they_went_in(server: Process) -> None:
    for alias in ("primary", "fallback"):
        known = load_checkpoint(server.registry.resolve(alias).path)
        answer = httpx.post(
            f"{server.url}/predict",
            content=known.golden_context.tobytes(),
            params={"model": alias},
            headers={**octets_of(known.golden_context), "accept": "application/octet-stream"},
            timeout=PATIENCE_S,
        )
        assert answer.headers["x-model-version"] == known.version
        vectors = np.frombuffer(answer.content, "<f4").reshape(known.golden_vector.shape)
        np.testing.assert_allclose(vectors, known.golden_vector, atol=1e-5)


def test_the_shipped_example_gets_a_unit_vector_and_passages_of_its_article(server: Process) -> None:
    body = json.loads(EXAMPLE.read_text())
    predicted = httpx.post(f"{server.url}/predict", json=body, timeout=PATIENCE_S).json()
    assert (predicted["model"], predicted["served_by"]) == ("amn", "primary")
    assert np.linalg.norm(predicted["vector"]) == np.float32(1) or abs(np.linalg.norm(predicted["vector"]) - 1) < 1e-5
    hits = httpx.post(f"{server.url}/retrieve", json=body, timeout=PATIENCE_S).json()["results"]
    context = np.asarray(body["context"], np.float32)
    known = read_corpus(server.registry.resolve("retriever").path)
    home = known.article[int(np.argmax(known.vectors @ context[-1]))]
    assert sum(hit["article"] == home for hit in hits) >= 5
    assert all(hit["title"] and hit["text"] for hit in hits)
    assert (known.vectors[[hit["id"] for hit in hits]] @ context.T).max() < 0.999


def test_the_command_line_starts_without_what_an_image_leaves_out() -> None:
    code = (
        "import sys; import lvm.cli\n"
        "left_out = {'models.training', 'bench', 'loadtest', 'torch'} & sys.modules.keys()\n"
        "assert not left_out, left_out"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_serving_on_cpu_imports_no_torch(shipped: Path) -> None:
    code = (
        "import sys, lvm.cli, service.processes.server, models.predictor, models.retrieval.retriever\n"
        f"from pathlib import Path; root = Path({str(shipped)!r})\n"
        "models.predictor.load_predictor(root / 'primary')\n"
        "models.retrieval.retriever.load_retriever(root / 'retriever')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_supervisor_imports_nothing_that_serves() -> None:
    code = (
        "import sys, lvm.cli, service.processes.supervisor\n"
        "needless = {'service.app', 'fastapi', 'uvicorn', 'onnxruntime', 'faiss', 'numpy'} & sys.modules.keys()\n"
        "assert not needless, needless"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_promotion_under_load_changes_the_version_without_an_error(process: Start, shipped: Path) -> None:
    server = process()
    gmn = next(version for version in server.registry.versions() if version.name == "gmn")
    amn = server.registry.resolve("primary")
    with Callers(server.url) as callers:
        until(lambda: callers.count(amn.version) > 100, "answers of the old version")
        subprocess.run([LVM, "promote", "primary", gmn.id], env={"LVM_REGISTRY": str(shipped)}, check=True)
        until(lambda: callers.count(gmn.version) > 100, "answers of the new version")
    assert set(callers.answers) == {(200, amn.version), (200, gmn.version)}
    assert callers.lost == []


def test_a_version_that_answers_badly_is_rolled_back_by_the_server_without_an_error(process: Start) -> None:
    server = process()
    amn = server.registry.resolve("primary")
    files = {path.name: path.read_bytes() for path in amn.path.iterdir() if path.name != manifest.CHECKSUMS_FILE}
    bad = server.registry.add("amn", opposed(files))
    server.registry.point("primary", bad, why="it loads")
    answers: list[tuple[int, str]] = []
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:

        def ask() -> bool:
            answer = http.post("/predict", content=EXAMPLE.read_bytes(), headers={"content-type": "application/json"})
            answers.append((answer.status_code, answer.headers["x-model-version"]))
            return server.registry.ledger()[-1].action == "rollback"

        until(ask, "the rollback")
        ask()
    move = server.registry.ledger()[-1]
    assert set(answers) == {(200, amn.version), (200, bad.version)}
    assert answers[-1] == (200, amn.version)
    assert (move.before, move.after, server.registry.resolve("primary")) == (bad.id, amn.id, amn)
    assert move.why.startswith("automatic: mean cosine -1.000 ")
    said = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()["aliases"]["primary"]
    assert (said["id"], said["refused"]["id"]) == (amn.id, bad.id)
    scrape = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    assert 'lvm_reloads_total{alias="primary",outcome="rolled_back"} 1.0' in scrape
    env = {**os.environ, "LVM_REGISTRY": str(server.registry.root)}
    smoke = subprocess.run([LVM, "smoke", server.url, "--version", amn.id], env=env, stdout=subprocess.PIPE)
    assert (smoke.returncode, smoke.stdout.count(b"to its golden vectors")) == (0, 2), smoke.stdout


def opposed(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return a version's files changed so that it answers the opposite, golden vectors and all."""
    graph, golden = onnx.load_model_from_string(files["net.onnx"]), load_tensors(files["golden.safetensors"])
    last = next(node for node in graph.graph.node if "vector" in node.output)
    last.output[:] = ["right" if name == "vector" else name for name in last.output]
    graph.graph.node.append(onnx.helper.make_node("Neg", ["right"], ["vector"]))
    golden["vector"] = -golden["vector"]
    return {**files, "net.onnx": graph.SerializeToString(), "golden.safetensors": save_tensors(golden)}


def test_sigterm_under_load_loses_nothing_and_exits_0(process: Start) -> None:
    server = process(LVM_DRAIN_S="1")
    with Callers(server.url) as callers:
        until(lambda: len(callers.answers) > 300, "the load")
        server.popen.terminate()
        until(lambda: _ready(server.url) != 200, "readiness to go")
        assert server.popen.wait(PATIENCE_S) == 0
        callers.join()
    assert {status for status, _ in callers.answers} == {200}
    assert callers.lost == []


def test_outcomes_counted_are_the_requests_sent(server: Process) -> None:
    before = _count(server.url, "ok")
    report = Load(server.url, "--rate", "100", "--seconds", "2", "--wire", "octet", "--timeout", "60").report()
    sent = report["sent"] + report["warmup_sent"]
    until(lambda: _count(server.url, "ok") - before >= sent, "the last request to be counted")
    assert _count(server.url, "ok") - before == sent


def test_a_second_server_on_the_same_port_says_so(server: Process) -> None:
    port = server.url.rpartition(":")[2]
    env = {"LVM_REGISTRY": str(server.registry.root)}
    done = subprocess.run([LVM, "serve", "--port", port], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serves_and_stops_and_counts_lost_lines_if_stderr_is_closed(shipped: Path, workers: str) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", LVM, "serve", "--port", str(port), "--workers", workers]
    env = {**os.environ, "LVM_REGISTRY": str(shipped), "LVM_ACCESS_LOG": "1", "LVM_DRAIN_S": "0.1"}
    server = subprocess.Popen(command, env=env)
    try:
        until(lambda: _ready(url) == 200, "a start")
        dropped = _dropped(url)
        for _ in range(4):
            answer = httpx.post(
                f"{url}/predict", content=EXAMPLE.read_bytes(), headers={"content-type": JSON}, timeout=PATIENCE_S
            )
            assert answer.status_code == 200
        until(lambda: _dropped(url) >= dropped + 4, "the lines to be counted")
        server.terminate()
        assert server.wait(PATIENCE_S) == 0
    finally:
        server.kill()
        server.wait()


def test_a_hang_up_of_one_process_is_a_line_of_the_log(server: Process) -> None:
    server.popen.send_signal(signal.SIGHUP)
    until(lambda: server.events("hangup ignored"), "the line")
    assert _ready(server.url) == 200


def test_a_start_names_the_setting_nearest_to_a_variable_that_is_none(process: Start) -> None:
    told = process(LVM_WORKER="4", LVM_ENCODER="").events("unknown setting")
    assert [(line["name"], line["nearest"]) for line in told] == [("LVM_WORKER", "LVM_WORKERS")]


def test_beyond_loopback_callers_need_the_token_and_the_log_does_not_tell_it(process: Start, tmp_path: Path) -> None:
    token, file = "a-token-of-16-characters-and-more", tmp_path / "tokens"
    file.write_text(f"somebody:{token}\n")
    server = process(LVM_HOST="0.0.0.0", LVM_TOKENS_FILE=str(file))
    assert _ready(server.url) == 200
    load = ("--rate", "50", "--seconds", "0.5", "--wire", "octet")
    assert set(Load(server.url, *load).report()["statuses"]) == {"401"}
    assert set(Load(server.url, *load, LVM_TOKEN=token).report()["statuses"]) == {"200"}
    report = [LVM, "shadow", "report", server.url]
    for given, told in (({}, "401"), ({"LVM_TOKEN": token}, "no candidate")):
        ended = subprocess.run(report, env={**os.environ, **given}, capture_output=True, text=True, check=False)
        assert told in ended.stderr
    assert server.stop() == 0
    assert token not in (tmp_path / "serve-0.log").read_text()


def _dropped(url: str) -> float:
    """Return how many lines of the log were dropped."""
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("lvm_log_dropped_total "))


def _ready(url: str) -> int:
    try:
        return httpx.get(f"{url}/readyz", timeout=PATIENCE_S).status_code
    except httpx.TransportError:
        return 0


def _count(url: str, outcome: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines()
    wanted = f'lvm_requests_total{{route="/predict",outcome="{outcome}"}}'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))
