"""Disks that are full, failing or read-only: the alias stays whole, nothing half-written shows, the next try works."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from models.registry import manifest
from models.registry.registry import Registry
from tests.conftest import ROOT, Mount
from tests.fakes import contexts
from tests.faults.conftest import Injected, Target, lvm, sizes
from tests.faults.versions import tiny_registry


@sizes(1, 3)
def test_every_write_fails_once_and_the_registry_stays_whole(
    count: int, shim: Path, tmp_path: Path, injected: Injected
) -> None:
    env = {**os.environ, "LD_PRELOAD": str(shim)}
    command = [sys.executable, "-m", "tests.faults.writes", tmp_path, str(count)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 8 * count
    assert min(found.values()) > 5, "the shim does not see the writes"
    for what, number in found.items():
        injected(what, "registry whole, the next try works", number)


def fill(disk: Path) -> Path:
    """Leave not a byte on `disk`; return what takes the room."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def is_whole(registry: Registry) -> bool:
    """Whether every alias and version is complete, and nothing of a failed try is left."""
    for version in (*registry.versions(), *map(registry.resolve, registry.aliases())):
        manifest.read_files(version.path)
    return not list(registry.root.rglob(".part-*"))


def test_a_full_disk_takes_no_version_and_spoils_none(mount: Mount, injected: Injected) -> None:
    registry = Registry(tiny_registry(mount("size=256k") / "registry"))
    before = registry.versions()
    for room in range(0, 64 * 1024, 4096):
        filler = fill(registry.root.parent)
        os.truncate(filler, filler.stat().st_size - room)
        with pytest.raises(OSError, match="No space left"):
            registry.add("amn", {"a": bytes(room), "b": b"x"})
        assert (registry.versions(), is_whole(registry)) == (before, True)
        filler.unlink()
        injected("a full disk under Registry.add", "refused, nothing half-written")
    assert registry.add("amn", {"a": b""}) in registry.versions()


def test_a_disk_without_room_for_a_name_moves_no_alias(mount: Mount, injected: Injected) -> None:
    registry = Registry(tiny_registry(mount("size=4m,nr_inodes=40") / "registry"))
    before, spare = registry.aliases(), registry.find(registry.resolve("fallback").id)
    with suppress(OSError):
        for number in range(100):
            (registry.root.parent / f"filler-{number}").touch()
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            registry.point("primary", spare)
        assert (registry.aliases(), is_whole(registry)) == (before, True)
        injected("no inode left under Registry.point", "refused, the alias stays")
    for file in registry.root.parent.glob("filler-*"):
        file.unlink()
    assert registry.point("primary", spare).after == registry.resolve("primary").id


def test_a_full_disk_under_the_ledger_leaves_the_alias_whole(mount: Mount, injected: Injected) -> None:
    """The ledger fills its page, so that its next line wants room that there is not."""
    registry = Registry(tiny_registry(mount("size=256k") / "registry"))
    ledger = registry.root / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b"\n" * (-ledger.stat().st_size % 4096))
    filler = fill(registry.root.parent)
    with pytest.raises(OSError, match="No space left"):
        registry.point("primary", registry.resolve("fallback"))
    assert is_whole(registry)
    assert set(registry.aliases()) == {"primary", "fallback"}
    filler.unlink()
    registry.point("primary", registry.resolve("fallback"))
    assert registry.ledger()[-1].after == registry.resolve("primary").id
    injected("a full disk under the ledger", "the alias resolves, the next try is written down")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A customer's tiny checkpoint."""
    torch = pytest.importorskip("torch")
    from models.nets import build

    net = build("amn", {"dim": 8, "context_length": 5, "key_dim": 4, "hidden_dim": 4})
    torch.save({"model_state_dict": net.state_dict()}, tmp_path / "customer.pt")
    return tmp_path / "customer.pt"


@pytest.mark.faults
def test_commands_on_a_full_disk_say_so_by_their_status(mount: Mount, checkpoint: Path, injected: Injected) -> None:
    registry = Registry(tiny_registry(mount("size=400k,nr_inodes=60") / "registry"))
    env, before = {"LVM_REGISTRY": str(registry.root)}, registry.aliases()
    commands = [
        ["import", str(checkpoint), "--name", "amn"],
        ["promote", "primary", before["primary"], "--force", "--why", "full"],
        ["rollback", "primary"],
    ]
    filler = fill(registry.root.parent)
    with suppress(OSError):
        for number in range(100):
            (registry.root.parent / f"name-{number}").touch()
    for command, (code, _, said) in zip(commands, lvm(commands, env), strict=True):
        assert code == (1 if command[0] == "rollback" else 74), (command, said)
        assert (registry.aliases(), is_whole(registry)) == (before, True), command
        injected(f"a full disk under lvm {command[0]}", "status 74 (or 1: nothing to go back to), alias whole")
    for file in (filler, *registry.root.parent.glob("name-*")):
        file.unlink()
    for command, (code, _, said) in zip(commands[:2], lvm(commands[:2], env), strict=True):
        assert code == 0, (command, said)


@pytest.mark.faults
def test_a_read_only_registry_is_served_and_not_changed(
    mount: Mount, checkpoint: Path, tmp_path: Path, target: Callable[..., Target], injected: Injected
) -> None:
    registry = Registry(mount("ro", tiny_registry(tmp_path / "registry")))
    env, before = {"LVM_REGISTRY": str(registry.root)}, registry.aliases()
    commands = [
        ["import", str(checkpoint), "--name", "amn"],
        ["promote", "primary", before["primary"], "--force", "--why", "read-only"],
        ["rollback", "primary"],
        ["corpus", "new", "--data", str(ROOT / "artifacts" / "lvm" / "retriever")],
    ]
    for command, (code, _, said) in zip(commands, lvm(commands, env), strict=True):
        assert code == 74, (command, said)
        assert "Read-only file system" in said
        injected(f"a read-only file system under lvm {command[0]}", "status 74")
    assert registry.aliases() == before
    server = target(registry.root)
    assert server.http.post("/predict", json={"context": contexts()[0].tolist()}).status_code == 200
    injected("a read-only file system under lvm serve", "serves")


RACER = """
import sys
from pathlib import Path
from models.registry.registry import RegistryLocked, Registry
registry, won, lost = Registry(Path(sys.argv[1])), 0, 0
versions = registry.versions()
for turn in range(int(sys.argv[2])):
    try:
        registry.point("primary", versions[turn % 2])
        won += 1
    except RegistryLocked:
        lost += 1
print(won, lost)
"""


def test_of_racing_promoters_each_moves_the_alias_or_is_told(tmp_path: Path, injected: Injected) -> None:
    registry = Registry(tiny_registry(tmp_path / "registry"))
    known = len(registry.ledger())
    command = [sys.executable, "-c", RACER, registry.root, "100"]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    told = [tuple(map(int, racer.communicate()[0].split())) for racer in racers]
    won, lost = (sum(column) for column in zip(*told, strict=True))
    moves = registry.ledger()[known:]
    assert (won + lost, len(moves)) == (600, won)
    assert [move.before for move in moves[1:]] == [move.after for move in moves[:-1]]
    assert is_whole(registry)
    assert lost, "they never met"
    injected("promotions by six racing processes", "moved and in the ledger, in one chain", won)
    injected("promotions by six racing processes", "told that the lock is held", lost)


@pytest.mark.faults
def test_the_loser_of_a_race_exits_75(tmp_path: Path, injected: Injected) -> None:
    registry = Registry(tiny_registry(tmp_path / "registry"))
    before, env = registry.aliases(), {"LVM_REGISTRY": str(registry.root)}
    commands = [["promote", "primary", before["primary"], "--force", "--why", "race"], ["rollback", "primary"]]
    with open(registry.root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = lvm(commands, env)
        plain = [sys.executable, "-m", "models.registry", "rollback", "primary"]
        status = subprocess.run(plain, cwd=ROOT, env={**os.environ, **env}, capture_output=True, check=False).returncode
    assert [*(code for code, _, _ in told), status] == [75, 75, 75]
    assert registry.aliases() == before
    injected("a promoter while another holds the lock", "exits 75, the alias stays", 3)
