"""`python -m tests.faults.writes HOME ERRORS`, below the shim: fail every write of every change to a registry.

SQLite's way: the Nth call fails, alone or with all that follow it, for N from 1 until the change is through without
meeting a fault. After each the registry must be whole, and the same change must then work. Prints the counts as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import count, product
from pathlib import Path

from models.registry import manifest
from models.registry.registry import Registry, main

ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS)
OLD, NEW = {"a": b"old", "b": bytes(5000)}, {"a": b"new", "b": bytes(100_000), "c": b""}
SURVIVED, FAILED = 0, 74


def add(registry: Registry) -> None:
    """Store a version."""
    registry.add("amn", NEW)


def point(registry: Registry) -> None:
    """Promote the other version."""
    registry.point("primary", registry.find("gru/" + next((registry.root / "models/gru").glob("2*")).name))


def rollback(registry: Registry) -> None:
    """Roll back, by the command that needs nothing installed."""
    os.environ["LVM_REGISTRY"] = str(registry.root)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        status = main(["rollback", "primary"])
    if status == FAILED:
        raise OSError("told by the status")


def first(registry: Registry) -> None:
    """Make a registry where there was none, and set an alias in it."""
    fresh = Registry(registry.root / "fresh")
    fresh.point("primary", fresh.add("amn", NEW))


CHANGES = (add, point, rollback, first)


def make(root: Path) -> Registry:
    """Return a registry whose primary has been moved once."""
    registry = Registry(root)
    old, other = registry.add("amn", OLD), registry.add("gru", NEW)
    for version in (other, old):
        registry.point("primary", version)
    return registry


def under_fault(change: Callable[[Registry], None], registry: Registry, at: int, error: int, stays: bool) -> int | None:
    """Make `change` in a child whose call number `at` fails; return its status, None where no call failed."""
    child = os.fork()
    if not child:
        os.environ.update(FAULT_AT=str(at), FAULT_ERRNO=str(error), FAULT_UNDER=str(registry.root))
        if stays:
            os.environ["FAULT_STAYS"] = "1"
        try:
            change(registry)
            status = SURVIVED
        except OSError:
            status = FAILED
        fired = ctypes.c_int.in_dll(ctypes.CDLL(None), "fault_fired").value
        os._exit(status if fired else 99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == 99 else status


def check(registry: Registry) -> None:
    """Hold the registry to what must be true of one at any time."""
    for alias in registry.aliases():
        manifest.read_files(registry.resolve(alias).path)
    for version in registry.versions():
        assert manifest.read_digest(version.path).startswith(version.version.partition("-")[2])
        manifest.read_files(version.path)
    assert all(move.after for move in registry.ledger())


def trial(change: Callable[[Registry], None], registry: Registry, at: int, error: int, stays: bool) -> bool:
    """Make `change` under the fault, then without it; return whether it met the fault."""
    status = under_fault(change, registry, at, error, stays)
    assert status in (None, SURVIVED, FAILED), f"{change.__name__} at {at}: {status}"
    check(registry)
    assert "primary" in registry.aliases()
    change(registry)
    check(registry)
    return status is not None


def fail_writes(home: Path, errors: int) -> dict[str, int]:
    """Return how many faults each change met, of the first `errors` kinds."""
    template, found = make(home / "template"), Counter[str]()
    for change, error, stays in product(CHANGES, ERRORS[:errors], (False, True)):
        for at in count(1):
            registry = Registry(Path(shutil.copytree(template.root, home / "copy", symlinks=True)))
            is_met = trial(change, registry, at, error, stays)
            shutil.rmtree(registry.root)
            if not is_met:
                break
            found[f"{errno.errorcode[error]} at the Nth write{' and all after' * stays}: {change.__name__}"] += 1
    return dict(found)


if __name__ == "__main__":
    print(json.dumps(fail_writes(Path(sys.argv[1]), int(sys.argv[2]))))
