"""An object store: what is pushed is whole before it is named, what is mirrored is verified, whatever breaks."""

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
    """Files of this machine behind calls that are counted, the nth of which fails."""

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
    """A registry that is pushed, the store, and a mirror of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.refused = root, set[str]()
        self.ours = Registry(root / "ours")
        self.objects = root / "store"
        self.remote = RemoteRegistry(f"breaking://{self.objects}")
        self.theirs = Registry(root / "mirror")
        self.mirror = RegistrySync(self.remote, self.theirs, self.check)

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
        for alias, said in self.mirror.poll().items():
            self.mirror.apply(alias, said)

    def is_whole(self) -> bool:
        """Whether every version that shows in the mirror is what was sealed, and nothing half-made is left."""
        for version in (*self.theirs.versions(), *map(self.theirs.resolve, self.theirs.aliases())):
            manifest.read_files(version.path)
        return not list(self.theirs.root.rglob(".part-*"))


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a place where a registry of two aliases was pushed to a store."""
    root = tmp_path_factory.mktemp("pushed")
    RemoteRegistry(f"file://{root}/store").push(registry_of(root / "ours", primary="amn", fallback="gru"))
    return root


@pytest.fixture
def site(tmp_path: Path, pushed: Path) -> Iterator[Site]:
    Breaking.count = Breaking.fatal = 0
    yield Site(Path(shutil.copytree(pushed, tmp_path / "site", symlinks=True)))
    Breaking.fatal = 0


def test_a_mirror_has_the_versions_the_aliases_and_why_they_moved(site: Site) -> None:
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


def test_what_is_there_is_not_pushed_again_and_what_is_here_not_fetched(site: Site) -> None:
    site.sync()
    Breaking.count = 0
    assert site.remote.push(site.ours) == {}
    assert Breaking.count == 5, "two sums, two aliases, and whether there is a candidate"
    Breaking.count = 0
    site.sync()
    assert Breaking.count == len(ALIASES)


@pytest.mark.parametrize("name", ["note.txt", "README.md", "SHA256SUMS"])
def test_a_tampered_object_is_refused_with_its_digest(site: Site, name: str) -> None:
    site.sync()
    before, new = site.theirs.aliases(), site.promote("gmn")
    object_ = site.objects / "models" / new.id / name
    object_.write_bytes(object_.read_bytes()[:-1] + b"!")
    with pytest.raises(Corrupt, match=f"{name} was altered: sha256 {manifest.digest(object_.read_bytes())[:12]}"):
        site.sync()
    assert site.theirs.aliases() == before
    assert site.is_whole()
    assert new.id not in {version.id for version in site.theirs.versions()}


def test_a_version_that_the_check_refuses_moves_no_alias(site: Site) -> None:
    site.sync()
    before, _ = site.theirs.aliases(), site.promote("gmn")
    site.refused.add("gmn")
    with pytest.raises(ValueError, match="golden"):
        site.sync()
    assert site.theirs.aliases() == before
    site.refused.clear()
    site.sync()
    assert site.theirs.aliases() == site.ours.aliases()


def test_a_name_that_means_harm_is_refused_and_nothing_is_fetched(site: Site) -> None:
    pointer = AliasRecord.from_json(site.remote.read("primary") or b"")
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
        move = replace(pointer.move, after=name)  # type: ignore[arg-type]
        with pytest.raises(BadAliasRecord):
            site.mirror.apply("primary", replace(pointer, move=move).to_json())
    assert Breaking.count == 0
    assert site.theirs.aliases() == {}


def test_what_is_no_pointer_is_refused(site: Site) -> None:
    nonsense = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"move": {}, "sha256": "0"}', b'{"move": [1]}']
    for said in nonsense:
        with pytest.raises(BadAliasRecord):
            site.mirror.apply("primary", said)


def test_an_id_is_bound_to_its_sums(site: Site) -> None:
    pointer = AliasRecord.from_json(site.remote.read("primary") or b"")
    with pytest.raises(Exception, match="does not end in the digest of its manifest"):
        site.mirror.apply("primary", replace(pointer, sha256="0" * 64).to_json())


def test_names_in_the_sums_stay_within_the_version(site: Site) -> None:
    sums = f"{'0' * 64}  ../../../escaped\n".encode()
    seal = manifest.digest(sums)
    at = site.objects / "models" / "amn" / f"20260101-{seal[:12]}"
    at.mkdir(parents=True)
    (at / manifest.CHECKSUMS_FILE).write_bytes(sums)
    pointer = AliasRecord.from_json(site.remote.read("primary") or b"")
    move = replace(pointer.move, after=f"amn/{at.name}")
    with pytest.raises(Corrupt, match="not a list of checksums"):
        site.mirror.apply("primary", AliasRecord(move, seal).to_json())
    assert not list(site.root.rglob("escaped"))


def test_wherever_the_wire_is_cut_the_mirror_is_whole_and_the_next_look_gets_there(site: Site) -> None:
    for fatal in range(1, 100):
        site.theirs = Registry(site.root / f"mirror-{fatal}")
        site.mirror = RegistrySync(site.remote, site.theirs, site.check)
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


def test_wherever_a_push_is_cut_the_store_names_only_what_is_whole(site: Site) -> None:
    for fatal in range(1, 100):
        store = RemoteRegistry(f"breaking://{site.root}/store-{fatal}")
        Breaking.count, Breaking.fatal = 0, fatal
        with suppress(RemoteUnavailable):
            store.push(site.ours)
        if Breaking.count < fatal:
            break
        Breaking.fatal = 0
        for said in filter(None, map(store.read, ALIASES)):
            pointer = AliasRecord.from_json(said)
            assert manifest.is_intact(site.root / f"store-{fatal}" / "models" / pointer.move.after, pointer.sha256)
        assert all(map(store.read, store.push(site.ours)))
        assert {alias for alias in ALIASES if store.read(alias)} == {"primary", "fallback"}
    assert 20 < fatal < 99


def test_what_another_registry_pushed_is_taken_back_only_by_force(site: Site) -> None:
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


def test_a_damaged_version_is_not_published(site: Site) -> None:
    bad = add_version(site.ours, "gmn")
    (bad.path / "note.txt").write_bytes(b"altered")
    site.ours.point("primary", bad)
    before = site.remote.read("primary")
    with pytest.raises(Corrupt, match=r"note\.txt was altered"):
        site.remote.push(site.ours)
    assert site.remote.read("primary") == before


def test_what_a_kill_left_halfway_goes_with_the_next_version(site: Site) -> None:
    left = site.theirs.root / "models" / "amn" / ".part-killed" / "files"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_bytes(b"half")
    site.sync()
    assert site.is_whole()


def test_what_was_spoiled_in_the_mirror_is_fetched_anew(site: Site) -> None:
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


def test_mirrors_in_one_directory_fetch_a_version_once(site: Site) -> None:
    checked, start = list[str](), threading.Barrier(4)

    def apply(_: int) -> None:
        mirror = RegistrySync(
            site.remote, Registry(site.theirs.root), lambda alias, version: checked.append(version.id)
        )
        start.wait()
        for alias, said in mirror.poll().items():
            mirror.apply(alias, said)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(apply, range(4)))
    assert sorted(checked) == sorted(site.ours.aliases().values())
    assert site.theirs.aliases() == site.ours.aliases()
    assert site.is_whole()


def test_an_alias_moved_back_here_stays_so_until_the_store_says_something_new(site: Site) -> None:
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


def test_a_candidate_goes_and_what_answers_callers_stays(site: Site) -> None:
    site.ours.point("candidate", add_version(site.ours, "lstm"))
    site.remote.push(site.ours)
    site.sync()
    assert "candidate" in site.theirs.aliases()
    (site.ours.root / "candidate").unlink()
    site.remote.push(site.ours)
    (site.objects / "aliases" / "fallback.json").unlink()
    site.sync()
    assert site.theirs.aliases().keys() == {"primary", "fallback"}


def test_a_store_that_says_nothing_at_all_is_away(site: Site) -> None:
    site.objects.rename(site.root / "elsewhere")
    with pytest.raises(RemoteUnavailable, match="lvm push"):
        site.mirror.poll()


def test_memory_is_a_store_like_any_other(site: Site) -> None:
    store = RemoteRegistry("memory://somewhere/deep")
    assert store.push(site.ours).keys() == {"primary", "fallback"}
    RegistrySync(store, site.theirs, site.check).apply("primary", store.read("primary"))
    assert site.theirs.aliases() == {"primary": site.ours.aliases()["primary"]}


def test_an_alias_set_by_hand_is_published_too(site: Site) -> None:
    (site.ours.root / "ledger.jsonl").unlink()
    pushed = site.remote.push(site.ours, force=True)
    assert json.loads(pushed["primary"].to_json())["move"]["why"] == "set by hand"


@pytest.mark.parametrize("url", ["nosuch://bucket", "breaking2://x"])
def test_what_cannot_be_opened_is_no_store(url: str) -> None:
    with pytest.raises(UnsupportedRemote, match=r"cannot open .*: Protocol not known"):
        RemoteRegistry(url)


@pytest.mark.parametrize("secret", ["me:secret@there/x", "me:s3@cret@there/x", "there/x?sig=s3cret&se=2027"])
def test_a_password_or_a_signature_in_a_url_is_not_told(secret: str, tmp_path: Path) -> None:
    assert RemoteRegistry(f"memory://{secret}").name == "memory://there/x"
    with pytest.raises(UnsupportedRemote, match=r"cannot open nosuch://there/x: "):
        RemoteRegistry(f"nosuch://{secret}")
    assert local_directory(f"s3://{secret}", tmp_path) == local_directory("s3://there/x", tmp_path), (
        "nor is a new one a new mirror"
    )


def test_each_store_has_a_mirror_of_its_own_and_a_directory_is_itself(tmp_path: Path) -> None:
    one, other = (local_directory(f"s3://{bucket}/lvm", tmp_path) for bucket in ("one", "other"))
    assert one.parent == other.parent == tmp_path
    assert one != other
    assert local_directory("artifacts/lvm", tmp_path) == Path("artifacts/lvm")


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name), lambda path: path.write_bytes(b"[" * (1 << 21))],
)
def test_what_a_store_on_a_disk_has_in_place_of_an_alias_is_refused_alone(
    site: Site, make: Callable[[Path], object]
) -> None:
    make(site.objects / "aliases/candidate.json")
    said = site.mirror.poll()
    site.mirror.apply("primary", said["primary"])
    assert site.theirs.aliases().keys() == {"primary"}
    with pytest.raises(BadAliasRecord):
        site.mirror.apply("candidate", said["candidate"])


@pytest.mark.parametrize("name", [".mirror", "aliases/primary.json"])
def test_a_mirror_waits_for_no_pipe(site: Site, name: str) -> None:
    site.sync()
    path = site.theirs.root / name
    path.unlink()
    os.mkfifo(path)
    site.promote("amn")
    with pytest.raises(OSError, match="expected a regular file"):
        site.sync()
