"""Replicas on one registry: a read-only mount, a promotion that reaches all, a share that goes away and comes back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.registry.registry import Registry
from tests.conftest import LVM, PATIENCE_S, Mount, Process, until
from tests.faults.versions import files, tiny_registry


def lvm(registry: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LVM_REGISTRY": str(registry)}
    return subprocess.run([LVM, *words], env=env, capture_output=True, text=True, check=False)


def serves(server: Process) -> str:
    """Return the id of what a replica serves as `primary`."""
    said: dict[str, Any] = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()
    return str(said["aliases"]["primary"]["id"])


class Site:
    """A registry that a promoter writes, the read-only mount of it that replicas have, and two of these."""

    def __init__(self, tmp_path: Path, mount: Mount) -> None:
        self.registry = Registry(tiny_registry(tmp_path / "registry"))
        self.share = mount("ro", self.registry.root)
        logs = [tmp_path / f"serve-{number}.log" for number in (1, 2)]
        with ThreadPoolExecutor() as pool:
            self.replicas = list(pool.map(self._start, logs))

    def _start(self, log: Path) -> Process:
        return Process(self.share, log, LVM_RELOAD_S="0.05", LVM_DRAIN_S="0")


@pytest.fixture
def site(tmp_path: Path, mount: Mount) -> Iterator[Site]:
    """Return a registry behind a read-only mount and two replicas there."""
    made = Site(tmp_path, mount)
    yield made
    for replica in made.replicas:
        replica.popen.kill()
        replica.popen.wait()


def test_one_promotion_reaches_every_replica_of_a_read_only_mount_and_a_share_away_changes_nothing(site: Site) -> None:
    other = site.registry.find(site.registry.resolve("fallback").id)
    done = lvm(site.registry.root, "promote", "primary", other.id, "--force", "--why", "test")
    assert done.returncode == 0, done.stderr
    for replica in site.replicas:
        until(lambda replica=replica: serves(replica) == other.id, "the promotion to arrive")  # type: ignore[misc]
    urls = [word for replica in site.replicas for word in ("--url", replica.url)]
    asked = lvm(site.registry.root, "models", *urls, "--check", "--json")
    said = json.loads(asked.stdout)
    assert (asked.returncode, said["differing"]) == (0, {}), asked.stderr
    assert [replica["url"] for replica in said["replicas"]] == [replica.url for replica in site.replicas]
    for replica in said["replicas"]:
        live = replica["aliases"]["primary"]
        assert (live["id"], live["breaker"], live["since"][:2]) == (other.id, "closed", "20")
    assert not any(line["level"] == "error" for replica in site.replicas for line in replica.log())

    first = site.replicas[0]
    subprocess.run(["umount", "-l", site.share], check=True)  # what is left is an empty directory
    until(lambda: len(first.events("look at alias failed")) == 2, "the share to be missed")
    new = site.registry.add("amn", files(2))
    site.registry.point("primary", new)
    assert httpx.get(f"{first.url}/readyz", timeout=PATIENCE_S).status_code == 200
    assert serves(first) == other.id
    subprocess.run(["mount", "--bind", site.registry.root, site.share], check=True)
    until(lambda: serves(first) == new.id, "the share to be read again")
    assert len(first.events("look at alias failed")) == 2, "primary and fallback once each"
    assert [replica.stop() for replica in site.replicas] == [0, 0]
