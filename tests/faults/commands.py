"""`python -m tests.faults.commands PLAN`: run `lvm` commands with an ear to all that they open and run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # so that what it opens is not heard

from lvm import cli

OWN = re.compile(r"/(proc/self|dev)/(statm|fd/\d+)")  # its size, and files that it has opened, and told, by name
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
_heard: list[str] = []


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Remember what is run, and which files are opened by name; modules may be imported at any time."""
    path = arguments[0] if event == "open" and isinstance(arguments[0], str) else ""
    opens = path and not path.endswith((".py", ".pyc")) and not OWN.fullmatch(path)
    if event in RUNS or opens:
        _heard.append(f"{event} {arguments[0]!r}")


def run(command: list[str]) -> tuple[int, list[str], str]:
    """Run one command; return its status, what it ran and opened, and what it said to stderr."""
    sys.argv, said = ["lvm", *command], io.StringIO()
    _heard.clear()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), list(_heard), said.getvalue()
    except BaseException as error:
        return -1, list(_heard), f"{said.getvalue()} {type(error).__name__}: {error}"


def main(plan: dict[str, Any]) -> list[tuple[int, list[str], str]]:
    """Run the commands of `plan`."""
    run(["models"])  # imports what commands import
    with contextlib.suppress(ImportError):
        from models.training import importing  # noqa: F401
    if plan["grow_mb"]:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = size + plan["grow_mb"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.addaudithook(hook)
    return [run(command) for command in plan["commands"]]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
