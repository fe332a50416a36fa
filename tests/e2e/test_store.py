"""A registry in an object store over a real wire: pushed, followed, refused where tampered with, gone and back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from models.registry import manifest
from models.registry.registry import Registry, Version
from models.registry.remote import AliasRecord
from tests.conftest import LVM, PATIENCE_S, SERVE, Process, until
from tests.faults.versions import files, tiny_registry

pytest.importorskip("requests", reason="what fsspec speaks WebHDFS with")
ROOT = "/webhdfs/v1"


class Objects(BaseHTTPRequestHandler):
    """As much of WebHDFS as fsspec asks for, over objects by path."""

    protocol_version, wbufsize = "HTTP/1.1", -1  # an answer is one write: no delay for an acknowledgement
    objects: dict[str, bytes]

    def do_GET(self) -> None:
        path, asked = self._asked()
        data = self.objects.get(path)
        if data is None:
            error = {"exception": "FileNotFoundException", "message": path}
            self._answer(404, json.dumps({"RemoteException": error}).encode())
        elif asked["op"] == "GETFILESTATUS":
            status = {"type": "FILE", "length": len(data), "pathSuffix": ""}
            self._answer(200, json.dumps({"FileStatus": status}).encode())
        else:
            begin = int(asked["offset"])
            self._answer(200, data[begin : begin + int(asked["length"])])

    def do_PUT(self) -> None:
        path, asked = self._asked()
        if asked["op"] == "CREATE":
            self.objects[path] = b""
        self._answer(201, b'{"boolean": true}')

    def do_POST(self) -> None:
        path, _ = self._asked()
        self.objects[path] = self.objects[path] + self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(200, b"")

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path.removeprefix(ROOT), {name: values[-1] for name, values in parse_qs(url.query).items()}

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("location", f"http://127.0.0.1:{self.server.server_port}{self.path}")  # type: ignore[attr-defined]
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


class ObjectServer(ThreadingHTTPServer):
    """A store that can go away, connections and all, and come back at its port."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, objects: dict[str, bytes], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), type("Handler", (Objects,), {"objects": objects}))
        self.open: set[Any] = set()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def process_request(self, request: Any, address: Any) -> None:
        self.open.add(request)
        super().process_request(request, address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Callers that are cut off are what this is for."""

    def go_away(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Site:
    """A registry of ours, the store that it is pushed to, and where services mirror that."""

    def __init__(self, root: Path) -> None:
        self.root, self.objects = root, dict[str, bytes]()
        self.ours = Registry(tiny_registry(root / "ours"))
        self.server = ObjectServer(self.objects)
        self.url = f"webhdfs://127.0.0.1:{self.server.server_port}/lvm"
        self.environment = {
            "LVM_REGISTRY": self.url,
            "LVM_CACHE": str(root / "cache"),
            **dict.fromkeys(("LVM_STORE_S", "LVM_RELOAD_S"), "0.05"),
            "LVM_DRAIN_S": "0",
        }

    def push(self) -> None:
        env = {**os.environ, "LVM_REGISTRY": str(self.ours.root)}
        done = subprocess.run([LVM, "push", self.url], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def plant(self, version: Version, **spoiled: bytes) -> None:
        """Put a version into the store as somebody would who can write there, and name it."""
        for path in version.path.iterdir():
            self.objects[f"/lvm/models/{version.id}/{path.name}"] = spoiled.get(path.stem, path.read_bytes())
        pointer = AliasRecord(self.ours.ledger()[-1], manifest.read_digest(version.path))
        self.objects["/lvm/aliases/primary.json"] = pointer.to_json()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.server.go_away()


def said_by(server: Process) -> dict[str, Any]:
    """Return what a service says in /models."""
    said: dict[str, Any] = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()
    return said


def test_a_service_follows_a_store_refuses_what_was_tampered_with_and_outlives_its_absence(site: Site) -> None:
    site.push()
    server = Process(site.root, site.root / "serve.log", SERVE, **site.environment)
    try:
        first = site.ours.resolve("primary")
        said = said_by(server)
        assert said["aliases"]["primary"]["id"] == first.id
        assert (said["store"]["url"], said["store"]["is_stale"]) == (site.url, False)

        bad = site.ours.add("amn", files(2))
        site.ours.point("primary", bad)
        site.plant(bad, weights=(weights := (bad.path / "weights.safetensors").read_bytes()[:-1] + b"!"))
        # A look may have met half of the pointer: puts are not atomic there.
        until(lambda: (said_by(server)["aliases"]["primary"]["refused"] or {}).get("id") == bad.id, "the refusal")
        alias = said_by(server)["aliases"]["primary"]
        assert alias["id"] == first.id
        assert f"weights.safetensors was altered: sha256 {manifest.digest(weights)[:12]}" in alias["refused"]["reason"]
        assert [event["version"] for event in server.events("version refused")].count(bad.id) == 1

        good = site.ours.add("amn", files(3))
        site.ours.point("primary", good)
        site.plant(good)
        until(lambda: said_by(server)["aliases"]["primary"]["id"] == good.id, "the promotion")

        site.server.go_away()
        until(lambda: said_by(server)["store"]["is_stale"], "the store to be missed")
        assert httpx.get(f"{server.url}/readyz", timeout=PATIENCE_S).status_code == 200
        assert said_by(server)["aliases"]["primary"]["id"] == good.id
        site.server = ObjectServer(site.objects, site.server.server_port)
        until(lambda: not said_by(server)["store"]["is_stale"], "the store to be back")
        assert [len(server.events(event)) for event in ("registry store away", "registry store back")] == [1, 1]
        assert server.stop() == 0
    finally:
        server.popen.kill()
        server.popen.wait()


def test_a_cold_start_without_its_store_says_so_and_exits_75(tmp_path: Path) -> None:
    env = {**os.environ, "LVM_REGISTRY": "webhdfs://127.0.0.1:1/lvm", "LVM_CACHE": str(tmp_path)}
    done = subprocess.run(SERVE, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "webhdfs://127.0.0.1:1/lvm: ConnectionError" in done.stderr
    assert "next: check the network" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_waits_for_a_silent_store_ends_when_told_to(tmp_path: Path, number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        registry = f"webhdfs://127.0.0.1:{silent.getsockname()[1]}/lvm"
        process = subprocess.Popen(SERVE, env={**os.environ, "LVM_REGISTRY": registry, "LVM_CACHE": str(tmp_path)})
        asked, _ = silent.accept()
        with asked:
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == 0
