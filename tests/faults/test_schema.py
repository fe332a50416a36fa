"""What OpenAPI says is what a real server does: schemathesis, with all its checks, on every operation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.registry.registry import Registry
from tests.faults.conftest import Injected, Target
from tests.faults.versions import corpus_files, tiny_registry

Start = Callable[..., Target]
CONFIG = Path(__file__).with_name("schemathesis.toml")
PHASES = ("--phases", "examples,coverage,fuzzing", "--checks", "all", "--max-examples", "50", "--seed", "1")


@pytest.mark.faults
@pytest.mark.parametrize(
    "names", ["", '[parameters]\n"path.model" = "amn"\n'], ids=["any model", "a model that is served"]
)
def test_the_server_is_as_its_openapi_says(names: str, tmp_path: Path, target: Start, injected: Injected) -> None:
    registry = Registry(tiny_registry(tmp_path / "registry"))
    registry.point("retriever", registry.add("corpus", corpus_files()))
    server = target(registry.root, {"LVM_TIMEOUT_MS": "60000"})
    (tmp_path / "config.toml").write_text(CONFIG.read_text() + names)
    tool = [Path(sys.executable).with_name("schemathesis"), "--config-file", tmp_path / "config.toml"]
    report = ("--report", "har", "--report-har-path", tmp_path / "all.har", "--generation-database", "none")
    command = [*tool, "run", f"{server.url}/openapi.json", *PHASES, *report, "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Unresolvable" not in done.stdout, done.stdout[-3000:]
    sent = len(json.loads((tmp_path / "all.har").read_text())["log"]["entries"])
    more = sum(server.counted().values()) - sent
    assert 1 <= more <= 5, "the document itself, and what schemathesis tries before it begins"
    server.sent += sent + more
    injected("schemathesis: requests, right and wrong, to every operation", "as OpenAPI says", sent)
