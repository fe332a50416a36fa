"""Aliases always point at a complete version, every move is in the ledger, and a rollback needs only Python."""

import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from models.registry import manifest
from models.registry.registry import (
    ALIASES,
    AliasInUse,
    AliasMoved,
    AmbiguousVersion,
    BadName,
    BrokenAlias,
    Ledger,
    NothingToRollBack,
    Registry,
    RegistryError,
    RegistryLocked,
    UnknownVersion,
    Version,
)

ROOT = Path(__file__).parents[3]
IMPORT = "import os, pwd, sys; from models.registry.registry import main"
ROLL_BACK = "sys.exit(main(['rollback', 'primary']))"
EVIL = [
    "../secret",
    "..",
    ".",
    "",
    "/",
    "//",
    "primary/",
    "/etc/passwd",
    "toy/../../secret",
    "toy/..",
    "..%2fsecret",
    "%2e%2e%2fsecret",
    "toy\x00",
    "\x00",
    "toy/\x00",
    "~root",
    "toy/" + "a" * 5000,
    "TOY",
    "toy\n",
    ".part-x",
    ".lock",
    "ledger.jsonl",
    "models",
    "*",
    "toy/*",
    "\ud800",
]


def add(registry: Registry, *contents: str, name: str = "toy") -> list[Version]:
    return [registry.add(name, {"file": content.encode()}) for content in contents]


def run(root: Path, *arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run the module without site-packages, and with no environment but LVM_REGISTRY."""
    return subprocess.run(
        [sys.executable, "-S", "-s", "-m", "models.registry", *arguments],
        cwd=ROOT,
        env={"LVM_REGISTRY": str(root), "PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,  # type: ignore[call-overload]
    )


# Versions


def test_a_version_is_found_by_id_by_version_and_by_alias(registry: Registry) -> None:
    (version,) = add(registry, "a")
    registry.point("primary", version)
    assert registry.find(version.id) == registry.find(version.version) == registry.find("primary") == version
    assert version.id == f"toy/{version.version}"
    assert manifest.read_files(version.path) == {"file": b"a"}


def test_versions_lists_every_complete_one_by_name(registry: Registry) -> None:
    versions = [*add(registry, "a", name="beta"), *add(registry, "a", name="alpha")]
    assert registry.versions() == versions[::-1]


def test_equal_files_make_one_version(registry: Registry) -> None:
    first, second = add(registry, "same", "same")
    assert first.version.split("-")[1] == second.version.split("-")[1]
    assert set(registry.versions()) == {first, second}  # two only where midnight fell between them
    assert first == second or first.version[:8] != second.version[:8]


def test_other_files_make_another_version(registry: Registry) -> None:
    first, second = add(registry, "a", "b")
    assert first.version.split("-")[1] != second.version.split("-")[1]


def test_adding_an_existing_version_leaves_it_untouched(registry: Registry) -> None:
    (version,) = add(registry, "same")
    before = (version.path / "file").stat().st_ino
    (again,) = add(registry, "same")
    assert again != version or (version.path / "file").stat().st_ino == before
    assert not list(registry.root.glob("models/toy/.part-*"))


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "Amn", ".amn", "a b", "a\x00", "a" * 65, "ä", "amn\n"])
def test_rejects_an_invalid_name_before_writing(registry: Registry, name: str) -> None:
    with pytest.raises(BadName, match="invalid name"):
        registry.add(name, {"file": b""})
    assert not list(registry.root.iterdir())


def test_a_failed_write_leaves_nothing_behind(registry: Registry) -> None:
    with pytest.raises(TypeError):
        registry.add("toy", {"a": b"fine", "b": "no bytes"})  # type: ignore[dict-item]
    assert registry.versions() == []
    assert list((registry.root / "models/toy").iterdir()) == []


def test_ignores_partial_versions_of_a_crash(registry: Registry) -> None:
    (version,) = add(registry, "a")
    home = version.path.parent
    manifest.write_files(home / ".part-crash", {"file": b"half"})
    (home / ".part-other" / "files").mkdir(parents=True)
    (home / "20250101-unfinished").mkdir()
    (registry.root / ".part-primary-1").symlink_to("models/toy/gone")
    assert registry.versions() == [version]
    for residue in (".part-crash", "toy/.part-crash", "20250101-unfinished"):
        with pytest.raises(UnknownVersion):
            registry.find(residue)
    registry.point("primary", version)
    assert registry.resolve("primary") == version


def test_a_version_of_two_models_must_be_named_in_full(registry: Registry) -> None:
    (one,), (other,) = add(registry, "same", name="one"), add(registry, "same", name="other")
    if one.version == other.version:  # unless midnight fell between them
        with pytest.raises(AmbiguousVersion, match=f"names 2 versions, newest first: .*{one.id}"):
            registry.find(one.version)
    assert registry.find(one.id) == one
    assert registry.find(other.id) == other


def test_the_name_of_a_model_finds_its_only_version(registry: Registry) -> None:
    (one,), (other,) = add(registry, "same", name="one"), add(registry, "same", name="other")
    assert registry.find("one") == one
    assert registry.find("other") == other
    with pytest.raises(UnknownVersion, match=r"no version 'on' in .*, which has one, other"):
        registry.find("on")


def test_the_name_of_a_model_with_several_versions_finds_none_and_lists_them_newest_first(registry: Registry) -> None:
    versions = add(registry, *(f"text {number}" for number in range(12)))
    for age, version in enumerate(reversed(versions)):
        os.utime(version.path / "SHA256SUMS", (1e9 - age, 1e9 - age))
    newest = ", ".join(version.id for version in versions[:-11:-1])
    with pytest.raises(AmbiguousVersion) as raised:
        registry.find("toy")
    assert str(raised.value) == f"'toy' names 12 versions, newest first: {newest} and 2 older"


def test_an_alias_comes_before_a_model_of_its_name(registry: Registry) -> None:
    (one,), (other,) = add(registry, "a", name="one"), add(registry, "b", name="primary")
    registry.point("primary", one)
    assert registry.find("primary") == one
    assert registry.find(other.id) == other


def test_an_empty_or_absent_registry_has_nothing(registry: Registry, tmp_path: Path) -> None:
    for empty in (registry, Registry(tmp_path / "absent")):
        assert empty.versions() == []
        assert empty.aliases() == {}
        assert empty.ledger() == []
        with pytest.raises(UnknownVersion, match="alias 'primary' is not set"):
            empty.resolve("primary")


# Names that mean harm

_opened: list[str] = []
_listening = threading.Event()


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _listening.is_set() and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_listen)  # cannot be taken off again; idle while nobody listens


@contextmanager
def opened() -> Iterator[list[str]]:
    """Collect the path of every file that is opened."""
    _opened.clear()
    _listening.set()
    try:
        yield _opened
    finally:
        _listening.clear()


def test_the_listener_hears_of_files(tmp_path: Path) -> None:
    with opened() as paths:
        (tmp_path / "x").write_text("")
    assert paths == [str(tmp_path / "x")]


@pytest.mark.parametrize("wanted", EVIL)
def test_a_malicious_name_is_unknown_and_opens_no_file(registry: Registry, wanted: str) -> None:
    add(registry, "a")
    manifest.write_files(registry.root.parent / "secret", {"file": b"secret"})
    manifest.write_files(registry.root / "models" / "secret", {"file": b"secret"})
    with opened() as paths:
        with pytest.raises(UnknownVersion):
            registry.find(wanted)
        with pytest.raises(UnknownVersion):
            registry.resolve(wanted)
        with pytest.raises(ValueError, match="unknown alias"):
            registry.point(wanted, Version("toy", "x", registry.root))
    assert paths == []


@pytest.mark.parametrize("alias", EVIL)
def test_never_rolls_back_a_malicious_alias(registry: Registry, alias: str) -> None:
    with pytest.raises(NothingToRollBack):
        registry.rollback(alias)


def test_resolve_follows_no_link_but_the_aliases(registry: Registry) -> None:
    (version,) = add(registry, "a")
    (registry.root / "shadow").symlink_to(version.path.relative_to(registry.root))
    with pytest.raises(UnknownVersion):
        registry.resolve("shadow")


def test_symlinked_versions_and_models_are_unknown(registry: Registry, tmp_path: Path) -> None:
    (version,) = add(registry, "a")
    manifest.write_files(tmp_path / "outside", {"file": b"evil"})
    version.path.with_name("20250101-linked").symlink_to(tmp_path / "outside")
    (registry.root / "models" / "linked").symlink_to(version.path.parent)
    assert registry.versions() == [version]
    with opened() as paths:
        for wanted in ("20250101-linked", "toy/20250101-linked", f"linked/{version.version}"):
            with pytest.raises(UnknownVersion):
                registry.find(wanted)
    assert paths == []


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("/etc", "points at the absolute path '/etc', expected models/NAME/VERSION"),
        ("..", "points at '..', expected models/NAME/VERSION"),
        ("models", "expected models/NAME/VERSION"),
        ("models/toy", "expected models/NAME/VERSION"),
        ("models/toy/gone", "points at 'models/toy/gone', which does not exist"),
        ("models/toy/linked", "a symbolic link, expected a directory"),
        ("models/toy/partial", "has no SHA256SUMS: copy the whole version"),
        ("../x/y", "expected models/NAME/VERSION"),
        ("models/../../outside", "expected models/NAME/VERSION"),
        ("models/a/b/c", "expected models/NAME/VERSION"),
        ("primary", "expected models/NAME/VERSION"),
    ],
)
def test_explains_an_invalid_link(registry: Registry, tmp_path: Path, target: str, fault: str) -> None:
    (version,) = add(registry, "a")
    manifest.write_files(tmp_path / "outside", {"file": b"evil"})
    version.path.with_name("linked").symlink_to(version.path)
    version.path.with_name("partial").mkdir()
    (registry.root / "primary").symlink_to(target)
    with pytest.raises(BrokenAlias, match=f"alias 'primary' in .*{re.escape(fault)}"):
        registry.resolve("primary")
    assert registry.alias_faults().keys() == {"primary"}
    registry.point("primary", version)
    assert registry.resolve("primary") == version
    assert registry.alias_faults() == {}


def test_explains_an_alias_that_became_a_file_and_promotion_repairs_it(registry: Registry) -> None:
    (version,) = add(registry, "a")
    (registry.root / "primary").write_text(f"models/{version.id}")
    assert registry.aliases() == {}
    with pytest.raises(BrokenAlias, match=r"is a file, not a symbolic link .*core\.symlinks=false.*ln -sfn"):
        registry.resolve("primary")
    registry.point("primary", version)
    assert registry.resolve("primary") == version


def test_rejects_promotion_over_a_directory(registry: Registry) -> None:
    (version,) = add(registry, "a")
    shutil.copytree(version.path, registry.root / "primary")
    for move in (
        lambda: registry.resolve("primary"),
        lambda: registry.point("primary", version),
        lambda: registry.find("primary"),
    ):
        with pytest.raises(BrokenAlias, match=r"is a directory, not a symbolic link .*cp -rL.*remove it, then"):
            move()
    assert sorted(path.name for path in registry.root.iterdir()) == [".lock", "models", "primary"]
    assert registry.ledger() == []


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["ledger.jsonl", ".lock"])
def test_never_blocks_on_special_files(registry: Registry, make: Callable[[Path], object], name: str) -> None:
    (version,) = add(registry, "a")
    make(registry.root / name)
    with pytest.raises(OSError, match="expected a regular file"):
        registry.point("primary", version)
    assert registry.aliases() == {}
    assert run(registry.root, "rollback", "primary").returncode == 74


def test_removes_a_leftover_directory(registry: Registry) -> None:
    (version,) = add(registry, "a")
    (registry.root / ".part-x/deep").mkdir(parents=True)
    registry.point("primary", version)
    assert not list(registry.root.glob(".part-*"))


def test_lists_versions_next_to_unrelated_files(registry: Registry) -> None:
    (version,) = add(registry, "a")
    (registry.root / "models/notes.txt").write_text("x")
    (registry.root / "models/loop").symlink_to("loop")
    os.mkfifo(registry.root / "models/pipe")
    (version.path.parent / "notes.txt").write_text("x")
    (version.path.parent / "circle").symlink_to("circle")
    os.mkfifo(version.path.parent / "pipe")
    assert registry.versions() == [version]


# Shared by a group


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode) for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("directory", "file"), [(0o2775, 0o664), (0o2770, 0o660), (0o755, 0o644), (0o700, 0o600), (0o1777, 0o664)]
)
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_new_files_inherit_the_permissions_of_the_directory(
    registry: Registry, umask: int, directory: int, file: int
) -> None:
    registry.root.chmod(directory)
    before = os.umask(umask)
    try:
        (version,) = add(registry, "a")
        registry.point("primary", version)
    finally:
        os.umask(before)
    found = modes(registry.root)
    del found["primary"]
    assert found.pop("ledger.jsonl") == found.pop(".lock") == file
    at = f"models/{version.id}"
    assert found.pop(f"{at}/file") == found.pop(f"{at}/SHA256SUMS") == file
    assert {mode & 0o2777 for mode in found.values()} == {directory & 0o2775}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("is_shared", "status"), [(True, 0), (False, 74)])
def test_only_group_members_change_files_of_others(registry: Registry, is_shared: bool, status: int) -> None:
    os.chown(registry.root, 12345, 54321)
    registry.root.chmod(0o2775)
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    become = f"os.setgroups([]); os.setgid({54321 if is_shared else 54322}); os.setuid(12346)"
    code = f"{IMPORT}; os.chdir({str(registry.root)!r}); {become}"
    answer = subprocess.run(
        [sys.executable, "-S", "-c", f"{code}; {ROLL_BACK}"],
        cwd=ROOT,
        env={"LVM_REGISTRY": ".", "PATH": os.defpath},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == status, answer.stderr
    assert "Traceback" not in answer.stderr
    assert ("Permission denied" in answer.stderr) == (not is_shared)
    assert registry.resolve("primary") == (a if is_shared else b)


# Aliases


def test_promotion_writes_a_relative_link_and_a_line(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    first = registry.point("primary", a, why="the first")
    second = registry.point("primary", b, why='better: "ä"\n')
    assert os.readlink(registry.root / "primary") == f"models/{b.id}"
    assert (first.before, first.after, first.action) == (None, a.id, "promote")
    assert (second.before, second.after, second.why) == (a.id, b.id, 'better: "ä"\n')
    assert registry.ledger() == [first, second]
    assert registry.aliases() == {"primary": b.id}
    assert all(move.who and move.time.endswith("+00:00") for move in registry.ledger())


def test_a_registry_can_be_moved(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    moved = Registry(registry.root.rename(registry.root.with_name("moved")))
    assert moved.resolve("primary").id == b.id
    assert moved.rollback("primary").after == a.id


def test_aliases_move_alone(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    for alias in ALIASES:
        registry.point(alias, a)
    registry.point("fallback", b)
    registry.rollback("fallback")
    registry.point("candidate", b)
    assert registry.aliases() == {alias: b.id if alias == "candidate" else a.id for alias in ALIASES}


def test_rollback_goes_one_back_and_twice_two(registry: Registry) -> None:
    a, b, c = add(registry, "a", "b", "c")
    for version in (a, b, c):
        registry.point("primary", version)
    assert registry.rollback("primary", why="bad day").after == b.id
    assert registry.resolve("primary") == b
    assert registry.rollback("primary").after == a.id
    with pytest.raises(NothingToRollBack):
        registry.rollback("primary")
    assert registry.resolve("primary") == a
    assert [move.action for move in registry.ledger()] == ["promote"] * 3 + ["rollback"] * 2
    assert registry.ledger()[3].why == "bad day"


def test_rollback_after_coming_back_goes_to_the_version_between(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    for version in (a, b, a):
        registry.point("primary", version)
    assert [registry.rollback("primary").after for _ in range(2)] == [b.id, a.id]
    with pytest.raises(NothingToRollBack):
        registry.rollback("primary")


def test_rollback_skips_repeated_promotions(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    for version in (a, b, b, b):
        registry.point("primary", version)
    assert registry.rollback("primary").after == a.id


def test_promotion_after_a_rollback_forgets_what_was_rolled_back(registry: Registry) -> None:
    a, b, c = add(registry, "a", "b", "c")
    registry.point("primary", a)
    registry.point("primary", b)
    registry.rollback("primary")
    registry.point("primary", c)
    assert registry.rollback("primary").after == a.id


def test_an_alias_that_is_removed_has_its_line_and_a_rollback_sets_it_again(registry: Registry) -> None:
    first, second = add(registry, "a", "b")
    registry.point("candidate", first)
    registry.point("candidate", second)
    move = registry.unset("candidate", why="compared")
    assert registry.aliases() == {}
    assert (move.action, move.before, move.after, move.why) == ("unset", second.id, None, "compared")
    assert registry.ledger()[-1] == move
    assert [registry.rollback("candidate").after for _ in range(2)] == [second.id, first.id]
    assert registry.read_ledger().skipped == 0


def test_what_answers_callers_is_removed_only_by_force_and_the_primary_never(registry: Registry) -> None:
    (version,) = add(registry, "a")
    aliases = ("primary", "fallback", "retriever")
    for alias in aliases:
        registry.point(alias, version)
        with pytest.raises(AliasInUse):
            registry.unset(alias)
    registry.unset("fallback", force=True)
    with pytest.raises(AliasInUse, match="no service starts without 'primary'"):
        registry.unset("primary", force=True)
    assert registry.aliases().keys() == {"primary", "retriever"}


def test_an_alias_that_is_not_set_cannot_be_removed(registry: Registry) -> None:
    for alias in ("candidate", "nothing", "../candidate"):
        with pytest.raises(UnknownVersion, match="is not set"):
            registry.unset(alias)
    registry.root.joinpath("candidate").mkdir()
    with pytest.raises(BrokenAlias, match="is a directory"):
        registry.unset("candidate")
    assert registry.ledger() == []


def test_a_candidate_whose_version_is_gone_can_be_removed(registry: Registry) -> None:
    (version,) = add(registry, "a")
    registry.point("candidate", version)
    shutil.rmtree(version.path)
    assert registry.unset("candidate").before == version.id
    assert not os.path.lexists(registry.root / "candidate")


def test_nothing_to_roll_back_changes_nothing(registry: Registry) -> None:
    (a,) = add(registry, "a")
    with pytest.raises(NothingToRollBack):
        registry.rollback("primary")
    registry.point("primary", a)
    with pytest.raises(NothingToRollBack):
        registry.rollback("primary")
    assert registry.resolve("primary") == a
    assert len(registry.ledger()) == 1


def test_rejects_rollback_to_a_missing_version(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    a.path.rename(a.path.with_name("gone"))
    with pytest.raises(UnknownVersion):
        registry.rollback("primary")
    assert registry.resolve("primary") == b


def test_a_lost_alias_is_rolled_back_to_the_last_known(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    (registry.root / "primary").unlink()
    assert registry.rollback("primary").after == b.id


def test_removes_leftovers_of_an_earlier_swap(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    (registry.root / ".part-primary").symlink_to("nowhere")
    (registry.root / ".part-fallback-17").symlink_to("nowhere")
    registry.point("primary", b)
    assert registry.resolve("primary") == b
    assert not list(registry.root.glob(".part-*"))


def test_a_reader_never_sees_a_missing_or_incomplete_version(registry: Registry) -> None:
    versions = add(registry, "a", "b")
    registry.point("primary", versions[0])
    done, seen, failures = threading.Event(), set(), []

    def read() -> None:
        while not done.is_set():
            try:
                version = registry.resolve("primary")
                seen.add(version.id)
                manifest.read_files(version.path)
            except (RegistryError, ValueError, OSError) as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(200):
        registry.point("primary", versions[step % 2])
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert seen <= {version.id for version in versions}
    assert len(registry.ledger()) == 201


def test_rejects_a_move_if_aliases_changed_since_the_judgement(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    since = {"primary": a.id, "fallback": None}
    registry.point("fallback", b)
    with pytest.raises(AliasMoved, match="fallback points at"):
        registry.point("primary", b, expected=since)
    assert registry.resolve("primary") == a
    assert registry.point("primary", b, expected=registry.aliases()).before == a.id


# The lock


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_held_lock_raises_at_once(registry: Registry, kind: int) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    with open(registry.root / ".lock", "w") as lock:
        fcntl.flock(lock, kind)
        with pytest.raises(RegistryLocked, match="try again"):
            registry.point("primary", a)
        with pytest.raises(RegistryLocked):
            registry.rollback("primary")
        assert run(registry.root, "rollback", "primary").returncode == 75
    assert registry.resolve("primary") == b
    assert len(registry.ledger()) == 2
    assert registry.rollback("primary").after == a.id  # the lock went with its holder


def test_releases_the_lock_after_a_failure(registry: Registry) -> None:
    (a,) = add(registry, "a")
    with pytest.raises(NothingToRollBack):
        registry.rollback("primary")
    assert registry.point("primary", a).after == a.id


# The ledger


def test_the_ledger_is_append_only(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    ledger, before = registry.root / "ledger.jsonl", b""
    for move in (
        lambda: registry.point("primary", a),
        lambda: registry.point("primary", b),
        lambda: registry.rollback("primary"),
    ):
        move()
        after = ledger.read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") == before.count(b"\n") + 1
        before = after


@pytest.mark.parametrize("torn", [b'{"time": "2025', b"\x00" * 30, b"\xff\xfe\xc3", b"[]", b'{"other": 1}', b"7"])
def test_skips_a_torn_line_and_starts_a_new_one(registry: Registry, torn: bytes) -> None:
    a, b = add(registry, "a", "b")
    first = registry.point("primary", a)
    with open(registry.root / "ledger.jsonl", "ab") as ledger:
        ledger.write(torn)
    assert registry.ledger() == [first]
    second = registry.point("primary", b)
    assert registry.ledger() == [first, second]
    lines = (registry.root / "ledger.jsonl").read_bytes().split(b"\n")
    assert lines[1] == torn
    assert json.loads(lines[2])["after"] == b.id
    assert registry.rollback("primary").after == a.id


def test_rollback_knows_a_move_missing_from_the_ledger(registry: Registry) -> None:
    a, b, c = add(registry, "a", "b", "c")
    for version in (a, b, c):
        registry.point("primary", version)
    ledger = registry.root / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0] + lines[2])
    assert [registry.rollback("primary").after for _ in range(2)] == [b.id, a.id]


def test_a_promotion_whose_line_was_lost_last_is_rolled_back_to_the_one_before(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    ledger = registry.root / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    assert registry.rollback("primary").after == a.id


def test_rejects_a_rollback_of_an_alias_that_moved(registry: Registry) -> None:
    a, b, c = add(registry, "a", "b", "c")
    registry.point("primary", c)
    with pytest.raises(AliasMoved, match="expected toy/"):
        registry.point("primary", a, action="rollback", expected={"primary": b.id})
    assert registry.resolve("primary") == c
    assert len(registry.ledger()) == 1
    assert registry.point("primary", a, action="rollback", expected={"primary": c.id}).after == a.id


def test_the_ledger_has_overridden_objections_and_reads_old_lines(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    first = registry.point("primary", a)
    ledger = registry.root / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace(', "overrode": []', ""))
    second = registry.point("primary", b, why="must be", overrode=("TooSlow",))
    assert registry.ledger() == [first, second]
    assert json.loads(ledger.read_text().splitlines()[1])["overrode"] == ["TooSlow"]


@pytest.mark.parametrize("is_first", [True, False])
def test_undoes_a_move_that_the_ledger_cannot_store(registry: Registry, is_first: bool) -> None:
    a, b = add(registry, "a", "b")
    if not is_first:
        registry.point("primary", a)
        (registry.root / "ledger.jsonl").unlink()
    before = registry.aliases()
    (registry.root / "ledger.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        registry.point("primary", b)
    assert registry.aliases() == before
    (registry.root / "ledger.jsonl").rmdir()
    assert registry.point("primary", b).before == before.get("primary")
    assert not list(registry.root.glob(".part-*"))


def test_an_alias_stays_if_the_ledger_cannot_store_that_it_was_removed(registry: Registry) -> None:
    (version,) = add(registry, "a")
    registry.point("candidate", version)
    (registry.root / "ledger.jsonl").unlink()
    (registry.root / "ledger.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        registry.unset("candidate")
    assert registry.resolve("candidate") == version


ODD_LINES = [
    b"null",
    b"[]",
    b"7",
    b"[" * 100_000,
    b"\x00" * 100,
    os.urandom(1000).replace(b"\n", b""),
    b'{"time": ' + b"9" * 5000 + b"}",
    b"x" * (3 << 20),
    json.dumps({"time": 1, "who": 2, "alias": "primary", "action": 3, "before": 4, "after": 5, "why": 6}).encode(),
]
MOVE = {"time": "", "who": "", "alias": "primary", "action": "promote", "before": None, "after": "toy/x", "why": ""}
ODD_MEMBERS = {
    "alias": ["primary"],
    "action": "push",
    "before": 7,
    "after": "no id",
    "why": None,
    "time": float("nan"),
    "overrode": [1],
}
ODD_MOVES = [
    {**MOVE, "action": "unset"},
    {**MOVE, "after": None},
    *({**MOVE, name: value} for name, value in ODD_MEMBERS.items()),
]


def test_skips_and_counts_invalid_lines_of_the_ledger(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    first = registry.point("primary", a)
    odd = [*ODD_LINES, *(json.dumps(move).encode() for move in ODD_MOVES)]
    with open(registry.root / "ledger.jsonl", "ab") as ledger:
        ledger.write(b"\n\r\n" + b"\n".join(odd) + b"\n")
    second = registry.point("primary", b)
    assert registry.read_ledger() == Ledger([first, second], len(odd))
    answer = run(registry.root, "rollback", "primary")
    assert (answer.returncode, answer.stdout) == (0, f"primary: {b.id} -> {a.id}\n")
    assert answer.stderr == f"invalid lines in the ledger: {len(odd)}\n"
    with pytest.raises(NothingToRollBack, match=f"invalid lines: {len(odd)}"):
        registry.rollback("primary")


def test_reads_a_ledger_that_an_editor_or_a_later_release_wrote(registry: Registry) -> None:
    (a,) = add(registry, "a")
    move = registry.point("primary", a)
    line = json.dumps({**vars(move), "who": "\ud800", "signature": "of a later release"}).encode()
    (registry.root / "ledger.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert registry.read_ledger() == Ledger([replace(move, who="?")], 0)


def test_rejects_a_giant_ledger_unread(registry: Registry) -> None:
    with open(registry.root / "ledger.jsonl", "wb") as ledger:
        ledger.truncate(1 << 40)
    with pytest.raises(OSError, match="is larger than"):
        registry.read_ledger()
    assert run(registry.root, "rollback", "primary").returncode == 74


# The bad day


def test_rollback_needs_nothing_but_python(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    answer = run(registry.root, "rollback", "primary")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"primary: {b.id} -> {a.id}\n", "")
    assert registry.resolve("primary") == a


def test_the_candidate_is_removed_with_nothing_but_python(registry: Registry) -> None:
    (version,) = add(registry, "a")
    for alias in ("candidate", "fallback"):
        registry.point(alias, version)
    answer = run(registry.root, "unset", "candidate")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"candidate: {version.id} -> nothing\n", "")
    refused = run(registry.root, "unset", "fallback")
    assert (refused.returncode, "'fallback' answers callers" in refused.stderr) == (1, True)
    assert registry.aliases().keys() == {"fallback"}


def test_the_module_imports_only_the_standard_library() -> None:
    code = "import sys, models.registry.registry as r; print(*sorted(m.split('.')[0] for m in sys.modules))"
    answer = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(answer.stdout.split()) - {"__main__", "models"} <= {*sys.stdlib_module_names}


@pytest.mark.parametrize("arguments", [(), ("rollback",), ("unset",), ("promote", "primary"), ("rollback", "a", "b")])
def test_any_other_command_is_a_usage_error(registry: Registry, arguments: tuple[str, ...]) -> None:
    answer = run(registry.root, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("usage:")


def test_the_exit_status_names_the_failure(registry: Registry) -> None:
    nothing = run(registry.root, "rollback", "primary")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no earlier version of 'primary'" in nothing.stderr
    absent = run(registry.root / "absent", "rollback", "primary")
    assert absent.returncode == 74
    assert "Traceback" not in absent.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_a_name_can_roll_back(registry: Registry) -> None:
    a, b = add(registry, "a", "b")
    registry.point("primary", a)
    registry.point("primary", b)
    nobody = 54321
    for path in (registry.root, *registry.root.rglob("*")):
        os.chown(path, nobody, -1, follow_symlinks=False)
    become = f"{IMPORT}; os.chdir({str(registry.root)!r}); os.setuid({nobody})"
    answer = subprocess.run(
        [sys.executable, "-S", "-c", f"{become}; {ROLL_BACK}"],
        cwd=ROOT,
        env={"LVM_REGISTRY": ".", "PATH": os.defpath},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert registry.ledger()[-1].who == str(nobody)


def test_an_unreadable_version_is_listed_but_does_not_resolve(registry: Registry) -> None:
    (version,) = add(registry, "a")
    registry.point("primary", version)
    version.path.chmod(0)
    code = (
        f"{IMPORT}; from models.registry.registry import Registry; from pathlib import Path\n"
        f"os.chdir({str(registry.root)!r}); os.setuid(54321)\n"
        "print([version.id for version in Registry(Path('.')).versions()])\n"
        "Registry(Path('.')).resolve('primary')"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == f"{[version.id]}\n", answer.stderr
    assert "PermissionError" in answer.stderr


def test_an_unreadable_link_is_not_an_unset_alias(tmp_path: Path) -> None:
    (tmp_path / "away").symlink_to("away")  # what leads in circles cannot be read, as a share that is away
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        Registry(tmp_path / "away").resolve("primary")
    with pytest.raises(UnknownVersion):
        Registry(tmp_path / "nowhere").resolve("primary")
