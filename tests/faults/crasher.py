"""Moves the alias `primary` between two versions in children that die: `python crasher.py REGISTRY A B`.

Reads an order a line, forks, and answers with the child's wait status and the steps that it took, both JSON. An order
is `{"move": "promote" or "rollback", "lines": bool, "step": N}`: killed at the Nth step, which is a call that the
interpreter audits because it reaches the system, or, with lines, a line of the registry's code too; or `{"delay": S}`:
moves without end, killed after S seconds. Standard library only.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from models.registry import manifest
from models.registry.registry import Registry

CODE = {inspect.getfile(Registry), manifest.__file__}
AUDITED = ("open", "os.", "fcntl.")


class Steps:
    """Counts the steps of this process, and kills it at the one given."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.count = fatal, 0

    def take(self) -> None:
        """Count one; it may be the last."""
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Count the lines of the registry."""
        if frame.f_code.co_filename not in CODE:
            return None
        if event == "line":
            self.take()
        return self.trace

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count the calls that reach the system."""
        if event.startswith(AUDITED):
            self.take()


def move(registry: Registry, kind: str, versions: tuple[str, str]) -> None:
    """Promote the version that is not served, or roll back."""
    if kind == "rollback":
        registry.rollback("primary")
    else:
        (other,) = {*versions} - {registry.resolve("primary").id}
        registry.point("primary", registry.find(other))


def step_by_step(registry: Registry, versions: tuple[str, str], order: dict[str, Any], answer: int) -> None:
    """Do the move of an order; where it lives to tell, write the count of its steps."""
    steps = Steps(order["step"])
    sys.addaudithook(steps.audit)
    if order["lines"]:
        sys.settrace(steps.trace)
    move(registry, order["move"], versions)
    sys.settrace(None)
    os.write(answer, str(steps.count).encode())


def carry_out(registry: Registry, versions: tuple[str, str], order: dict[str, Any]) -> dict[str, int]:
    """Fork for an order and wait for the end."""
    mine, answer = os.pipe()
    child = os.fork()
    if child == 0:
        if "step" in order:
            step_by_step(registry, versions, order, answer)
            os._exit(0)
        while True:
            move(registry, "promote", versions)
            move(registry, "rollback", versions)
    os.close(answer)
    if "delay" in order:
        time.sleep(order["delay"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(mine) as told:
        return {"status": status, "steps": int(told.read() or 0)}


def main() -> None:
    """Carry out orders until there are no more."""
    root, one, other = sys.argv[1:]
    registry = Registry(Path(root))
    for line in sys.stdin:
        print(json.dumps(carry_out(registry, (one, other), json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
