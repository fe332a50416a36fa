"""Real servers for every test that wants one: the app on a real socket, in a thread or as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import hypothesis
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.registry.registry import Registry
from service.app import Service, create_app
from service.engines.search import SearchAdapter
from service.processes.server import Server, uvicorn_config
from service.processes.sockets import bind
from service.settings import Settings
from tests.fakes import FakeLoader, mean_of, registry_of
from tests.fakes import retriever as corpus_of
from tests.scraping import scrape

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "artifacts" / "lvm"
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, children would ignore it
LVM = Path(sys.executable).with_name("lvm")
SERVE = (LVM, "serve", "--port", "0")
PATIENCE_S = 300  # for what takes a second on a quiet machine
Mount = Callable[..., Path]
# the same examples in each run, and no limit on the time of one, for other processes may hold the processor
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for `condition`, for as long as a slow machine may need."""
    for _ in range(PATIENCE_S * 50):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE_S} s in vain for {what}")


class Running:
    """An app on a real socket, and a client for it."""

    def __init__(self, app: Service, url: str, server: Server) -> None:
        self.app, self.url, self.server = app, url, server
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S)

    def metric(self, name: str, **labels: str) -> float:
        """Return one sample of the app's metrics, 0 where there is none."""
        families = text_string_to_metric_families(scrape(self.app.metrics)[0].decode())
        found = [s.value for family in families for s in family.samples if (s.name, s.labels) == (name, labels)]
        return found[0] if found else 0.0


@contextmanager
def running(app: Service, settings: Settings, http: str = "") -> Iterator[Running]:
    """Serve `app` in a thread, as plain ASGI below uvicorn's own protocol if `http` names one."""
    config = uvicorn_config(app, settings)
    config.http = http or config.http
    server = Server(config, app, settings)

    def is_listening() -> bool:
        return server.started and (app.grpc is None or bool(app.grpc.port))

    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: is_listening() or not thread.is_alive(), "the server to start")
            assert is_listening(), app.state.process.failure
            client = Running(app, "http://{}:{}".format(*listener.getsockname()), server)
            with client.http:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Return a function that serves fakes: `serve(amn=answer, gru=answer, http="", some_setting=...)`."""
    with ExitStack() as stack:

        def start(
            *,
            retriever: bool = True,
            corpus=corpus_of,
            text=None,
            search_model=SearchAdapter,
            amn=mean_of,
            gru=mean_of,
            http="",
            **settings,
        ):  # type: ignore[no-untyped-def]
            aliases = {"primary": "amn", "fallback": "gru"} | ({"retriever": "corpus"} if retriever else {})
            registry = registry_of(tmp_path / "registry", **aliases)
            known = Settings(registry=registry.root, reload_s=0.05, **settings)
            app = create_app(known, FakeLoader(corpus, text, search_model, amn=amn, gru=gru))
            return stack.enter_context(running(app, known, http))

        yield start


class Process:
    """A real `lvm serve`, or another `command`, its log, and its registry (a copy of the shipped one)."""

    def __init__(self, registry: Path, log: Path, command: Sequence[str | Path] = SERVE, **environment: str) -> None:
        self.registry = Registry(registry)
        self._file = log
        env = {**os.environ, "LVM_REGISTRY": str(registry), **environment}
        with log.open("wb") as file:
            self.popen = subprocess.Popen(command, env=env, stderr=file, stdout=file)
        until(lambda: self.url or self.popen.poll() is not None, f"a start: {log}")
        assert self.popen.poll() is None, log.read_text()

    def log(self) -> list[dict[str, str]]:
        """Return the log's lines."""
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]

    def text(self) -> str:
        """Return the log as it was written."""
        return self._file.read_text()

    def events(self, name: str) -> list[dict[str, str]]:
        """Return the log's events of one name."""
        return [line for line in self.log() if line["event"] == name]

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        said = self.events("listening")
        return said[0]["url"] if said else ""

    def stop(self) -> int:
        """Ask it to go; return the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(PATIENCE_S)


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """Return a copy of the registry that ships."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "lvm", symlinks=True))


@pytest.fixture
def process(shipped: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Return a function that starts `lvm serve` on a copy of the shipped registry."""
    started: list[Process] = []

    def start(**environment: str) -> Process:
        started.append(Process(shipped, tmp_path / f"serve-{len(started)}.log", **environment))
        return started[-1]

    yield start
    for each in started:
        each.popen.kill()
        each.popen.wait()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a small file system in memory, or another place once more: `mount("size=64k")`."""
    mounted: list[Path] = []

    def make(options: str, source: Path | None = None) -> Path:
        if os.geteuid() != 0:
            pytest.skip("mounting wants root")
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        what = ["--bind", source] if source else ["-t", "tmpfs", "tmpfs"]
        done = subprocess.run(["mount", *what, "-o", options, place], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no mounting here: {done.stderr.strip()}")
        mounted.append(place)
        if source:
            subprocess.run(["mount", "-o", f"remount,bind,{options}", place], check=True)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)
