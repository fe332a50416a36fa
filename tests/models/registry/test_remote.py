"""A remote registry: pushed versions are complete before an alias names them, and copies are verified."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from models.registry import manifest
from models.registry.manifest import Corrupt
from models.registry.registry import ALIASES, AliasMoved, Registry, Version
from models.registry.remote import (
    AliasRecord,
    BadAliasRecord,
    RegistrySync,
    RemoteRegistry,
    RemoteUnavailable,
    UnsupportedRemote,
    local_directory,
)
from tests.fakes import add_version, registry_of

STEPS = ("cat_file", "get_file", "put_file", "pipe_file", "makedirs", "rm_file")


class Breaking(LocalFileSystem):  # type: ignore[misc]
    """A local file system that counts its calls and fails at the nth."""

    protocol = "breaking"
    cachable = False
    count: ClassVar[int] = 0
    fatal: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix("breaking://")))


def _breaking(name: str) -> Callable[..., Any]:
    def call(self: Breaking, *arguments: Any, **options: Any) -> Any:
        Breaking.count += 1
        if Breaking.count == Breaking.fatal:
            raise ConnectionResetError("the wire was cut")
        return getattr(LocalFileSystem, name)(self, *arguments, **options)

    return call


for step in STEPS:
    setattr(Breaking, step, _breaking(step))
fsspec.register_implementation("breaking", Breaking, clobber=True)


class Site:
    """A registry, the store that it is pushed to, and a synced copy."""

    def __init__(self, root: Path) -> None:
        self.root, self.refused = root, set[str]()
        self.ours = Registry(root / "ours")
        self.objects = root / "store"
        self.remote = RemoteRegistry(f"breaking://{self.objects}")
        self.theirs = Registry(root / "synced")
        self.registry_sync = RegistrySync(self.remote, self.theirs, self.check)

    def check(self, alias: str, version: Version) -> None:
        if version.name in self.refused:
            raise ValueError(f"{version.id} gives other answers than its golden vectors")

    def promote(self, name: str) -> Version:
        """Push a new version as `primary`."""
        version = add_version(self.ours, name, "new")
        self.ours.point("primary", version, why="better")
        self.remote.push(self.ours)
        return version

    def sync(self) -> None:
        for alias, content in self.registry_sync.poll().items():
            self.registry_sync.apply(alias, content)

    def is_whole(self) -> bool:
        """Whether every version in the copy matches its manifest, and no partial version is left."""
        for version in (*self.theirs.versions(), *map(self.theirs.resolve, self.theirs.aliases())):
            manifest.read_files(version.path)
        return not list(self.theirs.root.rglob(".part-*"))


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a registry with two aliases that was pushed to a store."""
    root = tmp_path_factory.mktemp("pushed")
    RemoteRegistry(f"file://{root}/store").push(registry_of(root / "ours", primary="amn", fallback="gru"))
    return root


@pytest.fixture
def site(tmp_path: Path, pushed: Path) -> Iterator[Site]:
    Breaking.count = Breaking.fatal = 0
    yield Site(Path(shutil.copytree(pushed, tmp_path / "site", symlinks=True)))
    Breaking.fatal = 0


def test_sync_copies_versions_aliases_and_reasons(site: Site) -> None:
    site.sync()
    new = site.promote("gmn")
    site.sync()
    assert site.theirs.aliases() == site.ours.aliases()
    assert manifest.read_files(site.theirs.resolve("primary").path) == manifest.read_files(new.path)
    move, theirs = site.ours.ledger()[-1], site.theirs.ledger()[-1]
    assert (theirs.action, theirs.before, theirs.after) == (move.action, move.before, move.after)
    assert theirs.why == f"better ({move.who}, {move.time})"
    known = len(site.theirs.ledger())
    site.sync()
    assert len(site.theirs.ledger()) == known


def test_further_fallbacks_are_pushed_and_synced(site: Site) -> None:
    site.ours.point("fallback-3", add_version(site.ours, "gmn"))
    assert site.remote.push(site.ours).keys() == {"fallback-3"}
    site.sync()
    assert site.theirs.aliases() == site.ours.aliases()


def test_transfers_nothing_twice(site: Site) -> None:
    site.sync()
    Breaking.count = 0
    assert site.remote.push(site.ours) == {}
    assert Breaking.count == 5, "two sums, two aliases, and whether there is a candidate"
    Breaking.count = 0
    site.sync()
    assert Breaking.count == len(ALIASES)


@pytest.mark.parametrize("name", ["note.txt", "README.md", "SHA256SUMS"])
def test_rejects_a_tampered_object_with_its_digest(site: Site, name: str) -> None:
    site.sync()
    before, new = site.theirs.aliases(), site.promote("gmn")
    object_ = site.objects / "models" / new.id / name
    object_.write_bytes(object_.read_bytes()[:-1] + b"!")
    with pytest.raises(Corrupt, match=f"{name} was altered: sha256 {manifest.digest(object_.read_bytes())[:12]}"):
        site.sync()
    assert site.theirs.aliases() == before
    assert site.is_whole()
    assert new.id not in {version.id for version in site.theirs.versions()}


def test_a_rejected_version_moves_no_alias(site: Site) -> None:
    site.sync()
    before, _ = site.theirs.aliases(), site.promote("gmn")
    site.refused.add("gmn")
    with pytest.raises(ValueError, match="golden"):
        site.sync()
    assert site.theirs.aliases() == before
    site.refused.clear()
    site.sync()
    assert site.theirs.aliases() == site.ours.aliases()


def test_rejects_a_malicious_name_and_fetches_nothing(site: Site) -> None:
    record = AliasRecord.from_json(site.remote.read("primary") or b"")
    evil = [
        "../../secret",
        "..",
        "amn/../..",
        "/etc/passwd",
        "amn",
        "amn/",
        "amn/a/b",
        "AMN/x",
        "amn/\0",
        "amn\n/x",
        "",
    ]
    Breaking.count = 0
    for name in (*evil, 7, None, ["amn", "x"]):
        move = replace(record.move, after=name)  # type: ignore[arg-type]
        with pytest.raises(BadAliasRecord):
            site.registry_sync.apply("primary", replace(record, move=move).to_json())
    assert Breaking.count == 0
    assert site.theirs.aliases() == {}


def test_rejects_invalid_alias_records(site: Site) -> None:
    record = AliasRecord.from_json(site.remote.read("primary") or b"")
    removed = replace(record, move=replace(record.move, action="unset", after=None)).to_json()
    nonsense = [
        removed,
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"move": {}, "sha256": "0"}',
        b'{"move": [1]}',
    ]
    for content in nonsense:
        with pytest.raises(BadAliasRecord):
            site.registry_sync.apply("primary", content)


def test_an_id_must_match_its_manifest(site: Site) -> None:
    record = AliasRecord.from_json(site.remote.read("primary") or b"")
    with pytest.raises(Exception, match="does not end in the digest of its manifest"):
        site.registry_sync.apply("primary", replace(record, sha256="0" * 64).to_json())


def test_rejects_paths_in_the_manifest(site: Site) -> None:
    sums = f"{'0' * 64}  ../../../escaped\n".encode()
    seal = manifest.digest(sums)
    at = site.objects / "models" / "amn" / f"20260101-{seal[:12]}"
    at.mkdir(parents=True)
    (at / manifest.CHECKSUMS_FILE).write_bytes(sums)
    record = AliasRecord.from_json(site.remote.read("primary") or b"")
    move = replace(record.move, after=f"amn/{at.name}")
    with pytest.raises(Corrupt, match="not a list of checksums"):
        site.registry_sync.apply("primary", AliasRecord(move, seal).to_json())
    assert not list(site.root.rglob("escaped"))


def test_a_sync_cut_anywhere_stays_intact_and_completes_later(site: Site) -> None:
    for fatal in range(1, 100):
        site.theirs = Registry(site.root / f"synced-{fatal}")
        site.registry_sync = RegistrySync(site.remote, site.theirs, site.check)
        Breaking.count, Breaking.fatal = 0, fatal
        with suppress(RemoteUnavailable):
            site.sync()
        if Breaking.count < fatal:
            break
        assert site.theirs.aliases() != site.ours.aliases()
        assert site.is_whole()
        site.sync()
        assert site.theirs.aliases() == site.ours.aliases()
    assert fatal == 1 + len(ALIASES) + 2 * 3, "every alias was asked for, every file of two versions fetched"


def test_a_push_cut_anywhere_names_only_complete_versions(site: Site) -> None:
    for fatal in range(1, 100):
        store = RemoteRegistry(f"breaking://{site.root}/store-{fatal}")
        Breaking.count, Breaking.fatal = 0, fatal
        with suppress(RemoteUnavailable):
            store.push(site.ours)
        if Breaking.count < fatal:
            break
        Breaking.fatal = 0
        for content in filter(None, map(store.read, ALIASES)):
            record = AliasRecord.from_json(content)
            assert manifest.is_intact(site.root / f"store-{fatal}" / "models" / record.move.after, record.sha256)
        assert all(map(store.read, store.push(site.ours)))
        assert {alias for alias in ALIASES if store.read(alias)} == {"primary", "fallback"}
    assert 20 < fatal < 99


def test_overwrites_another_registrys_push_only_by_force(site: Site) -> None:
    other = registry_of(site.root / "other", primary="amn")
    new = add_version(other, "gmn")
    other.point("candidate", new)
    other.point("primary", new, why="better")
    with pytest.raises(AliasMoved, match="primary was moved to amn/"):
        site.remote.push(other)
    assert site.remote.push(other, force=True).keys() == {"primary", "candidate"}
    before = {alias: site.remote.read(alias) for alias in ALIASES}
    with pytest.raises(AliasMoved, match=f"moved to {new.id} by .*: push from there, or --force"):
        site.remote.push(site.ours)
    assert {alias: site.remote.read(alias) for alias in ALIASES} == before
    site.remote.push(site.ours, force=True)
    assert (site.remote.read("candidate"), site.remote.push(site.ours)) == (None, {})


def test_never_pushes_a_damaged_version(site: Site) -> None:
    bad = add_version(site.ours, "gmn")
    (bad.path / "note.txt").write_bytes(b"altered")
    site.ours.point("primary", bad)
    before = site.remote.read("primary")
    with pytest.raises(Corrupt, match=r"note\.txt was altered"):
        site.remote.push(site.ours)
    assert site.remote.read("primary") == before


def test_removes_partial_downloads_with_the_next_version(site: Site) -> None:
    left = site.theirs.root / "models" / "amn" / ".part-killed" / "files"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_bytes(b"half")
    site.sync()
    assert site.is_whole()


def test_downloads_a_corrupt_local_version_again(site: Site) -> None:
    first = site.ours.resolve("primary")
    site.sync()
    site.promote("gmn")
    site.sync()
    note = site.theirs.find(first.id).path / "note.txt"
    note.write_bytes(b"rot")
    site.ours.rollback("primary")
    site.remote.push(site.ours)
    site.sync()
    assert manifest.read_files(site.theirs.resolve("primary").path) == manifest.read_files(first.path)
    assert site.theirs.ledger()[-1].action == "rollback"
    assert site.is_whole()


def test_processes_that_share_a_directory_fetch_once(site: Site) -> None:
    checked, start = list[str](), threading.Barrier(4)

    def apply(_: int) -> None:
        sync_ = RegistrySync(site.remote, Registry(site.theirs.root), lambda alias, version: checked.append(version.id))
        start.wait()
        for alias, content in sync_.poll().items():
            sync_.apply(alias, content)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(apply, range(4)))
    assert sorted(checked) == sorted(site.ours.aliases().values())
    assert site.theirs.aliases() == site.ours.aliases()
    assert site.is_whole()


def test_a_local_rollback_stays_until_the_record_changes(site: Site) -> None:
    site.sync()
    first, bad = site.theirs.resolve("primary"), site.promote("gmn")
    site.sync()
    site.theirs.point("primary", first, why="automatic", action="rollback", expected={"primary": bad.id})
    site.sync()
    assert site.theirs.resolve("primary") == first
    site.ours.rollback("primary")
    site.ours.point("primary", bad, why="once more")
    site.remote.push(site.ours)
    site.sync()
    assert site.theirs.resolve("primary").id == bad.id


def test_removes_only_the_candidate(site: Site) -> None:
    site.ours.point("candidate", add_version(site.ours, "lstm"))
    site.remote.push(site.ours)
    site.sync()
    assert "candidate" in site.theirs.aliases()
    site.ours.unset("candidate")
    site.remote.push(site.ours)
    (site.objects / "aliases" / "fallback.json").unlink()
    site.sync()
    assert site.theirs.aliases().keys() == {"primary", "fallback"}


def test_an_empty_store_is_unavailable(site: Site) -> None:
    site.objects.rename(site.root / "elsewhere")
    with pytest.raises(RemoteUnavailable, match="lvm push"):
        site.registry_sync.poll()


def test_works_with_the_memory_file_system(site: Site) -> None:
    store = RemoteRegistry("memory://somewhere/deep")
    assert store.push(site.ours).keys() == {"primary", "fallback"}
    RegistrySync(store, site.theirs, site.check).apply("primary", store.read("primary"))
    assert site.theirs.aliases() == {"primary": site.ours.aliases()["primary"]}


def test_pushes_an_alias_set_by_hand(site: Site) -> None:
    (site.ours.root / "ledger.jsonl").unlink()
    pushed = site.remote.push(site.ours, force=True)
    assert json.loads(pushed["primary"].to_json())["move"]["why"] == "set by hand"


@pytest.mark.parametrize("url", ["nosuch://bucket", "breaking2://x"])
def test_rejects_unsupported_urls(url: str) -> None:
    with pytest.raises(UnsupportedRemote, match=r"cannot open .*: Protocol not known"):
        RemoteRegistry(url)


@pytest.mark.parametrize("secret", ["me:secret@there/x", "me:s3@cret@there/x", "there/x?sig=s3cret&se=2027"])
def test_hides_secrets_of_a_url(secret: str, tmp_path: Path) -> None:
    assert RemoteRegistry(f"memory://{secret}").name == "memory://there/x"
    with pytest.raises(UnsupportedRemote, match=r"cannot open nosuch://there/x: "):
        RemoteRegistry(f"nosuch://{secret}")
    assert local_directory(f"s3://{secret}", tmp_path) == local_directory("s3://there/x", tmp_path), (
        "a new secret makes no new copy"
    )


def test_each_store_has_its_own_local_directory(tmp_path: Path) -> None:
    one, other = (local_directory(f"s3://{bucket}/lvm", tmp_path) for bucket in ("one", "other"))
    assert one.parent == other.parent == tmp_path
    assert one != other
    assert local_directory("artifacts/lvm", tmp_path) == Path("artifacts/lvm")


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name), lambda path: path.write_bytes(b"[" * (1 << 21))],
)
def test_rejects_special_files_in_place_of_an_alias(site: Site, make: Callable[[Path], object]) -> None:
    make(site.objects / "aliases/candidate.json")
    content = site.registry_sync.poll()
    site.registry_sync.apply("primary", content["primary"])
    assert site.theirs.aliases().keys() == {"primary"}
    with pytest.raises(BadAliasRecord):
        site.registry_sync.apply("candidate", content["candidate"])


@pytest.mark.parametrize("name", [".mirror", "aliases/primary.json"])
def test_never_blocks_on_a_pipe(site: Site, name: str) -> None:
    site.sync()
    path = site.theirs.root / name
    path.unlink()
    os.mkfifo(path)
    site.promote("amn")
    with pytest.raises(OSError, match="expected a regular file"):
        site.sync()
