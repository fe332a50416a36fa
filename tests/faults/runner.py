"""`python -m tests.faults.runner PLAN`: `lvm serve`, with what the JSON of PLAN says is wrong with it.

`answers` maps model names to the fakes of tests.fakes, or of here, that answer for them; `audit` names a file for the
audit hook's lines; `limits` maps names of `resource` to limits; `grow_mb` is the memory, in megabytes, that it may
take on top of what it has when it listens.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

from models.vectors import Floats
from service.app import create_app
from service.processes.server import Server, uvicorn_config
from service.processes.sockets import bind
from service.settings import read_settings
from service.telemetry.log import configure
from tests import fakes

HEARD = ("open", "exec", "os.listdir", "os.scandir", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
POISON = 7.0


def hangs(batch: Floats) -> Floats:
    """Never answer."""
    threading.Event().wait()
    raise AssertionError


def dies(batch: Floats) -> Floats:
    """End the thread that asks."""
    raise SystemExit


def slow(batch: Floats) -> Floats:
    """Answer rightly, late enough for others to queue up."""
    time.sleep(1)
    return fakes.mean_of(batch)


def poisoned(batch: Floats) -> Floats:
    """Fail, late, where one row holds the poison."""
    time.sleep(0.05)
    if (batch == POISON).any():
        raise RuntimeError("a row that no kernel can stand")
    return fakes.mean_of(batch)


def answer_of(name: str) -> Any:
    """Return the fake called `name`."""
    return globals().get(name) or getattr(fakes, name)


def listen_in(path: str) -> None:
    """Write every file that is opened, and everything that is run, to `path`."""
    heard = open(path, "a", buffering=1)  # noqa: SIM115

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in HEARD:
            heard.write(f"{event} {str(arguments[0])[:200]!r}\n")

    sys.addaudithook(hook)


def main(plan: dict[str, Any]) -> int:
    """Serve until told to stop; return the exit status."""
    settings = read_settings(port=0)
    configure(settings.log_level)
    answers = {name: answer_of(fake) for name, fake in plan.get("answers", {}).items()}
    app = create_app(settings, fakes.FakeLoader(**answers) if answers else None)
    server = Server(uvicorn_config(app, settings), app, settings)
    listen_in(plan["audit"])
    with bind(settings.host, settings.port) as listener:
        for name, limit in plan.get("limits", {}).items():
            resource.setrlimit(getattr(resource, name), (limit, limit))
        if grow_mb := plan.get("grow_mb"):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + grow_mb * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        server.run(sockets=[listener])
    return 0 if server.started and not server.force_exit else 1


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
