"""A directory that looks like the repository after `git clone`, in which the commands of a document are run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_S, ROOT, SHIPPED
from tests.docs import blocks
from tests.docs.blocks import Block

URL = "http://127.0.0.1:8000"
PRELUDE = """set -euo pipefail
[ ! -e .environment ] || . ./.environment
trap 'export -p >.environment' EXIT
curl() { case $1 in -*f*) command curl "$@";; *) command curl --fail-with-body "$@";; esac; }
stop() { [ ! -e .pid ] || { kill "$(cat .pid)" && tail --pid="$(cat .pid)" -f /dev/null; rm .pid; }; }
lvm() {
  if [ "$1" = serve ]; then
    stop
    command lvm "$@" >>serve.log 2>&1 & echo $! >.pid
    until command curl -sf "$LVM_URL/readyz" >>ready.log; do kill -0 "$(cat .pid)"; sleep 0.05; done
  else
    command lvm "$@"
    case $1 in promote|rollback) [ ! -e .pid ] || ./until_served;; esac
  fi
}
# What make installs is here.
make() { case $* in *serve*) lvm serve;; esac; }
"""
UNTIL_SERVED = """
import glob, json, os, time, urllib.request

def served(alias):
    with urllib.request.urlopen(os.environ["LVM_URL"] + "/models") as answer:
        return json.load(answer)["aliases"].get(alias, {}).get("id")

registry = os.environ.get("LVM_REGISTRY", "artifacts/lvm")
for link in filter(os.path.islink, glob.glob(registry + "/*")):
    alias, wanted = os.path.basename(link), os.readlink(link).removeprefix("models/")
    for _ in range(3000):
        if served(alias) == wanted:
            break
        time.sleep(0.02)
    else:
        raise SystemExit(f"{alias} does not serve {wanted}")
"""
ACTIVATE = 'PATH="$PWD/.venv/bin:{bin}:$PATH"\n'


class Clone:
    """The directory of a fresh clone with its environment; `lvm serve` serves on `url` until the next or `stop`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(SHIPPED, root / "artifacts/lvm", symlinks=True)
        for name in ("examples", "models", "service", "loadtest", "constraints.txt"):
            (root / name).symlink_to(ROOT / name)
        (root / "lvm-serve").symlink_to(root)
        bin_directory = Path(sys.executable).parent
        (root / ".venv/bin").mkdir(parents=True)
        (root / ".venv/bin/activate").write_text(ACTIVATE.format(bin=bin_directory))
        (root / "until_served").write_text(f"#!{sys.executable}\n{UNTIL_SERVED}")
        (root / "until_served").chmod(0o755)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.addresses = {URL: self.url, "/tmp/": f"{root}/"}
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(bin_directory), os.environ["PATH"]]),
            "LVM_PORT": str(port),
            "LVM_URL": self.url,
            "LVM_TIMEOUT_MS": "60000",
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("LVM_REGISTRY", None)

    def here(self, text: str) -> str:
        """Return a text of the documents with the addresses and directories of this clone."""
        for shown, real in self.addresses.items():
            text = text.replace(shown, real)
        return text

    def shell(self, script: str, prelude: str = PRELUDE) -> subprocess.CompletedProcess[str]:
        """Run a script of the documents and return how it ended and what it printed."""
        return subprocess.run(
            ["bash", "-c", prelude + self.here(script)],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
        )

    def run(self, block: Block, not_run: Mapping[str, str], expected: int = 0, prelude: str = PRELUDE) -> None:
        """Run the commands of a block in one shell and compare what they print with what the block shows."""
        commands = block.text.replace("\\\n", " ").splitlines()
        script = "\n".join(command for command in commands if not command.startswith(tuple(not_run)))
        done = self.shell(script, prelude)
        wanted = 22 if "urn:lvm:problem" in block.shown else expected
        assert done.returncode == wanted, f"{block.where}: {done.stderr}{done.stdout[-1000:]}"
        if block.shown:
            wrong = blocks.fault_of_output(block.shown, done.stdout, done.stderr)
            assert wrong is None, f"{block.where}: {wrong}"

    def execute(self, block: Block, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        """Run a program in the session that `names` are of and compare what it prints with what the block shows."""
        capsys.readouterr()
        exec(compile(self.here(block.text), block.where, "exec"), names)
        printed = capsys.readouterr().out
        assert printed == (block.shown or printed), block.where

    def stop(self) -> None:
        """Stop the service if one runs."""
        pid = self.root / ".pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGTERM)


def free_port() -> int:
    """Return a TCP port of loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
