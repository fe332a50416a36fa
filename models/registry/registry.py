"""The registry: versions, the aliases that point at them, and the ledger of every move.

Layout below the root: `models/<name>/<version>/` (a version's files and their manifest), `<alias>` (a relative symbolic
link to one of them), `ledger.jsonl` (one move a line, append-only).
Standard library only: `python -m models.registry rollback ALIAS`, and `unset ALIAS`, work if nothing else does.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from models.registry import disk, manifest
from models.registry.alias import ALIASES, Alias

Action = Literal["promote", "rollback", "unset"]
ACTIONS: tuple[Action, ...] = get_args(Action)
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_LEDGER = "ledger.jsonl"
_LOCK = ".lock"
_PART = ".part-"
# There is no link. Any other error may mean that a network share is unavailable.
_NO_LINK = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
# bytes
_MAX_LINE_BYTES = 1 << 20
_MAX_LEDGER_BYTES = 1 << 28
# names in an error message
_MAX_LISTED = 10


class RegistryError(Exception):
    """The registry cannot do what was asked."""


class BadName(RegistryError):
    """An invalid name of a model or a version."""


class UnknownVersion(RegistryError):
    """No version and no alias has this name."""


class AmbiguousVersion(UnknownVersion):
    """Several versions have this name; the message lists them."""


class BrokenAlias(UnknownVersion):
    """The entry of an alias is not a relative symbolic link to a version; the message names the remedy."""


class NothingToRollBack(RegistryError):
    """The ledger has no earlier version of the alias."""


class RegistryLocked(RegistryError):
    """Another process is changing the registry."""


class AliasMoved(RegistryError):
    """Another process has moved an alias since it was read."""


class AliasInUse(RegistryError):
    """An alias whose version answers callers is not to be removed."""


@dataclass(frozen=True)
class Move:
    """One line of the ledger: who moved an alias, when, from where to where, why, and over which objections.

    `after` is None if the alias was removed, which is the action `unset`.
    """

    time: str
    who: str
    alias: str
    action: Action
    before: str | None
    after: str | None
    why: str
    overrode: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, value: Any) -> Move:
        """Make a move of decoded JSON; members that a later release added are ignored.

        Raises:
            TypeError, ValueError: a member is missing or has the wrong type.
        """
        known = {each.name: value[each.name] for each in fields(cls) if each.name in value}
        move = cls(**{name: _replace_surrogates(member) for name, member in known.items()})
        texts = (move.time, move.who, move.alias, move.action, move.why, *move.overrode)
        if not all(isinstance(text, str) for text in texts) or move.action not in ACTIONS:
            raise ValueError("time, who, alias, action, why and overrode must be strings, action one of ACTIONS")
        if not all(_is_version_id(identity) for identity in (move.after, move.before) if identity is not None):
            raise ValueError("before and after must be ids of versions")
        if (move.after is None) is not (move.action == "unset"):
            raise ValueError("after must be None if the action is unset, and only then")
        return move


class Ledger(NamedTuple):
    """Every move, oldest first, and the number of invalid lines."""

    moves: list[Move]
    skipped: int


@dataclass(frozen=True)
class Version:
    """One immutable version in the directory `path`."""

    name: str
    version: str
    path: Path

    @property
    def id(self) -> str:
        """`<name>/<version>`, as aliases, the ledger and the command line have it."""
        return f"{self.name}/{self.version}"


class Registry:
    """Versions and aliases below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def versions(self) -> list[Version]:
        """Return every complete version, ordered by name, then by age."""
        names = _directories(self.root / "models")
        found = (self._listed(name, each) for name in names for each in _directories(self.root / "models" / name))
        return [version for version in found if version]

    def find(self, wanted: str) -> Version:
        """Return the version behind an alias, a `name/version`, a version without its name, or a model's name.

        No path outside the registry is read.

        Raises:
            UnknownVersion: no version matches.
            AmbiguousVersion: several versions match, for example because the model has several.
        """
        if wanted in ALIASES:
            return self.resolve(wanted)
        matches = self._matches(wanted)
        if not matches:
            raise UnknownVersion(f"no version {wanted!r} in {self.root}{self._models_listed()}")
        if len(matches) > 1:
            raise AmbiguousVersion(_ambiguity(wanted, matches))
        return matches[0]

    def resolve(self, alias: str) -> Version:
        """Return the version that `alias` points at; reads the link once.

        Raises:
            UnknownVersion: the alias is not set.
            BrokenAlias: the alias does not point at a version of this registry.
            OSError: the link or the version cannot be read, for example because a network share is unavailable.
        """
        target = self._target(alias)
        version = self._version(*target.split("/")) if target else None
        if version is None:
            if fault := self.alias_fault(alias):
                raise BrokenAlias(fault)
            raise UnknownVersion(f"alias {alias!r} is not set in {self.root}")
        return version

    def alias_fault(self, alias: str) -> str | None:
        """Return why the entry of an alias is invalid, and the remedy; None if it is valid or absent.

        Raises:
            OSError: the registry cannot be read.
        """
        path = self.root / alias
        if alias not in ALIASES or not os.path.lexists(path):
            return None
        found = self._why_bad_link(path) if path.is_symlink() else _why_not_a_link(path)
        return found and f"alias {alias!r} in {self.root} {found}"

    def alias_faults(self) -> dict[str, str]:
        """Return the fault of every alias that has one."""
        found = {alias: self.alias_fault(alias) for alias in ALIASES}
        return {alias: fault for alias, fault in found.items() if fault}

    def aliases(self) -> dict[str, str]:
        """Return the id of the version behind every alias that is set, by alias."""
        targets = {alias: self._target(alias) for alias in ALIASES}
        return {alias: target for alias, target in targets.items() if target}

    def add(self, name: str, files: Mapping[str, bytes | Path]) -> Version:
        """Store `files`, bytes or paths, as a new version of `name`: write to a temporary directory, sync, rename.

        A version is named by the date and the digest of its manifest, so equal files make one version a day.

        Raises:
            BadName: `name` is not a plain lower-case name.
        """
        check_name(name)
        part = self._make_part(name)
        try:
            return self._publish(part / "files", name, manifest.write_files(part / "files", files))
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def remove_partial_versions(self) -> None:
        """Remove unfinished versions that a crash left; the caller ensures that no other process adds a version."""
        for residue in self.root.glob(f"models/*/{_PART}*"):
            shutil.rmtree(residue, ignore_errors=True)

    def download(self, identity: str, sha256: str, fetch: manifest.Fetch) -> Version:
        """Store the version `identity` of another registry; `fetch` copies its files. Keep an intact local copy.

        `sha256` is the digest of its manifest. The caller ensures that only one process downloads a version at a time.

        Raises:
            BadName: the id does not belong to the manifest.
            Corrupt: a file does not match its checksum; nothing is stored.
        """
        name, version = split_id(identity)
        if not version.endswith(f"-{sha256[:12]}"):
            raise BadName(f"version {identity!r} does not end in the digest of its manifest, {sha256[:12]}")
        path = self.root / "models" / name / version
        if manifest.is_intact(path, sha256):
            return Version(name, version, path)
        part = self._make_part(name)
        try:
            manifest.download(part / "files", sha256, fetch)
            if path.exists():
                os.rename(path, part / "corrupt")
            os.rename(part / "files", path)
            manifest.sync_directory(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return Version(name, version, path)

    def point(
        self,
        alias: str,
        version: Version,
        *,
        why: str = "",
        action: Action = "promote",
        overrode: Sequence[str] = (),
        expected: Mapping[str, str | None] | None = None,
    ) -> Move:
        """Point `alias` at `version` atomically and append the move, with the objections it `overrode`, to the ledger.

        `expected` maps aliases to the versions that they pointed at when the move was judged. Nothing moves if one of
        them points elsewhere now.

        Raises:
            ValueError: no alias has this name.
            RegistryLocked: another promotion is running.
            AliasMoved: an alias differs from `expected`.
            BrokenAlias: a directory has the name of the alias.
        """
        if alias not in ALIASES:
            raise ValueError(f"unknown alias {alias!r}; choose from {', '.join(ALIASES)}")
        with self._lock():
            for known, target in (expected or {}).items():
                if self._target(known) != target:
                    moved = f"{known} points at {self._target(known)}, expected {target}"
                    raise AliasMoved(f"{moved}: another process moved this alias meanwhile; run `lvm promote` again")
            return self._swap(alias, version, why, action, overrode)

    def rollback(self, alias: str, *, why: str = "") -> Move:
        """Point `alias` at the version before the current one; a second call goes back one more.

        Raises:
            NothingToRollBack: the ledger has no earlier version.
            BrokenAlias: a directory has the name of the alias.
            UnknownVersion: the earlier version no longer exists.
            RegistryLocked: another promotion is running.
        """
        with self._lock():
            return self._swap(alias, self.find(self._previous(alias)), why, "rollback")

    def unset(self, alias: str, *, why: str = "", force: bool = False) -> Move:
        """Remove `alias` and append the move to the ledger; `rollback` sets it again.

        Services let the candidate go. What answers callers they keep until they restart, because a link that is gone
        may mean that a share is away. So other aliases are removed only with `force`, and the primary, without which
        no service starts, never.

        Raises:
            AliasInUse: the alias answers callers.
            UnknownVersion: the alias is not set.
            BrokenAlias: something other than a link to a version has the name of the alias.
            RegistryLocked: another promotion is running.
        """
        with self._lock():
            if self._target(alias) is None:
                fault = self.alias_fault(alias)
                raise BrokenAlias(fault) if fault else UnknownVersion(f"alias {alias!r} is not set in {self.root}")
            if alias == Alias.PRIMARY:
                raise AliasInUse(f"no service starts without {alias!r}: point it at another version instead")
            if alias != Alias.CANDIDATE and not force:
                raise AliasInUse(f"{alias!r} answers callers: running services would keep it until they restart")
            return self._swap(alias, None, why, "unset")

    def ledger(self) -> list[Move]:
        """Return every move, oldest first; invalid lines, such as one that a crash cut short, are skipped."""
        return self.read_ledger().moves

    def read_ledger(self) -> Ledger:
        """Return every move, oldest first, and how many lines are invalid.

        Raises:
            OSError: the ledger cannot be read, is not a regular file, or is too large.
        """
        found = [_parse_move(line) for line in self._lines() if line.strip()]
        moves = [move for move in found if move]
        return Ledger(moves, len(found) - len(moves))

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines of the ledger; of a line that is too long for a move, only its start."""
        path = self.root / _LEDGER
        with suppress(FileNotFoundError), open(disk.open_regular(path), "rb") as ledger:
            if os.fstat(ledger.fileno()).st_size > _MAX_LEDGER_BYTES:
                raise OSError(errno.EFBIG, f"is larger than {_MAX_LEDGER_BYTES} bytes", str(path))
            while line := ledger.readline(_MAX_LINE_BYTES):
                yield line
                while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = ledger.readline(_MAX_LINE_BYTES)

    def _previous(self, alias: str) -> str:
        history: list[str] = []
        moves, skipped = self.read_ledger()
        for move in moves:
            if move.alias != alias:
                continue
            # the first move, or one after a move that a crash left out of the ledger
            if move.before and history[-1:] != [move.before]:
                history.append(move.before)
            while move.action == "rollback" and len(history) > 1 and history[-1] != move.after:
                history.pop()
            if move.after and history[-1:] != [move.after]:
                history.append(move.after)
        earlier = [target for target in history if target != self._target(alias)]
        if not earlier:
            invalid = f" (invalid lines: {skipped})" if skipped else ""
            raise NothingToRollBack(f"the ledger has no earlier version of {alias!r}{invalid}")
        return earlier[-1]

    def _swap(
        self, alias: str, version: Version | None, why: str, action: Action, overrode: Sequence[str] = ()
    ) -> Move:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        after = version.id if version else None
        move = Move(now, _current_user(), alias, action, self._target(alias), after, why, list(overrode))
        self._check_replaceable(alias)
        # Open the ledger first: a user who may not write it must not move the alias.
        with self._ledger_to_append() as ledger:
            self._replace(alias, version, move, ledger)
        return move

    def _check_replaceable(self, alias: str) -> None:
        """Raise `BrokenAlias` if a directory has the name of the alias: no link can take its place."""
        path = self.root / alias
        if path.is_dir() and not path.is_symlink():
            raise BrokenAlias(str(self.alias_fault(alias)))

    def _replace(self, alias: str, version: Version | None, move: Move, ledger: BufferedRandom) -> None:
        # left by a crash: this process holds the lock
        for residue in self.root.glob(f"{_PART}*"):
            _remove_leftover(residue)
        links = self.root / f"{_PART}{alias}", self.root / f"{_PART}{alias}-before"
        links[1].symlink_to(os.readlink(self.root / alias) if move.before else "nowhere")
        if version:
            links[0].symlink_to(os.path.relpath(version.path, self.root))
            os.replace(links[0], self.root / alias)
        else:
            (self.root / alias).unlink()
        manifest.sync_directory(self.root)
        try:
            _append(ledger, json.dumps(asdict(move)) + "\n")
        except OSError:
            # no move without its line; the link that undoes it exists already
            self._undo(alias, links[1], move)
            raise
        links[1].unlink()

    def _undo(self, alias: str, link: Path, move: Move) -> None:
        if move.before:
            os.replace(link, self.root / alias)
        else:
            (self.root / alias).unlink()
        manifest.sync_directory(self.root)

    def _ledger_to_append(self) -> BufferedRandom:
        return open(disk.open_or_create(self.root / _LEDGER, os.O_RDWR | os.O_APPEND), "ab+")

    def _make_part(self, name: str) -> Path:
        """Create a temporary directory for a new version of `name`."""
        self.root.mkdir(parents=True, exist_ok=True)
        home = self.root / "models" / name
        disk.make_directory(home.parent)
        disk.make_directory(home)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=home))
        disk.inherit_permissions(part, home)
        return part

    def _matches(self, wanted: str) -> list[Version]:
        if "/" not in wanted:
            return [version for version in self.versions() if wanted in (version.version, version.name)]
        name, _, version = wanted.partition("/")
        found = self._listed(name, version)
        return [found] if found else []

    def _models_listed(self) -> str:
        """Return the names of the models for an error message."""
        names = list(dict.fromkeys(version.name for version in self.versions()))
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        return f", which has {', '.join(names[:_MAX_LISTED])}{more}" if names else ""

    def _publish(self, part: Path, name: str, sha256: str) -> Version:
        version = f"{datetime.now(UTC):%Y%m%d}-{sha256[:12]}"
        path = self.root / "models" / name / version
        if not path.exists():
            os.rename(part, path)
            manifest.sync_directory(path.parent)
        return Version(name, version, path)

    def _target(self, alias: str) -> str | None:
        if alias not in ALIASES:
            return None
        try:
            parts = Path(os.readlink(self.root / alias)).parts
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return None
        return "/".join(parts[1:]) if len(parts) == 3 and parts[0] == "models" else None

    def _version(self, name: str, version: str) -> Version | None:
        if not (_NAME.fullmatch(name) and _NAME.fullmatch(version)):
            return None
        path = self.root / "models" / name / version
        inside = not (path.is_symlink() or path.parent.is_symlink())
        return Version(name, version, path) if inside and (path / manifest.CHECKSUMS_FILE).is_file() else None

    def _listed(self, name: str, version: str) -> Version | None:
        """Return a version even if it is unreadable: it must not spoil a list, and reading it shows the fault."""
        try:
            return self._version(name, version)
        except OSError:
            return Version(name, version, self.root / "models" / name / version)

    def _why_bad_link(self, path: Path) -> str | None:
        """Return why a symbolic link is not a valid alias, None if it is."""
        target = os.readlink(path)
        mend = "`lvm promote` sets it again"
        if os.path.isabs(target):
            return f"points at the absolute path {target!r}, expected models/NAME/VERSION, relative to it: {mend}"
        parts = Path(target).parts
        if len(parts) != 3 or parts[0] != "models":
            return f"points at {target!r}, expected models/NAME/VERSION: {mend}"
        if self._listed(*parts[1:]):
            return None
        place = self.root / target
        if place.is_symlink() or place.parent.is_symlink():
            return f"points at {target!r}, a symbolic link, expected a directory: copy the target of that link there"
        if not place.exists():
            return f"points at {target!r}, which does not exist: copy that version there, or {mend}"
        return f"points at {target!r}, which has no {manifest.CHECKSUMS_FILE}: copy the whole version there, or {mend}"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self._open_lock(), "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RegistryLocked(f"another promotion holds {self.root / _LOCK}: try again") from error
            yield

    def _open_lock(self) -> int:
        try:
            return disk.open_or_create(self.root / _LOCK, os.O_RDWR)
        except PermissionError:
            # another user's file: read access is enough to lock it
            with suppress(FileNotFoundError):
                return disk.open_regular(self.root / _LOCK)
            raise


def check_name(name: str) -> str:
    """Return a valid name; raises `BadName` if it is invalid."""
    if not _NAME.fullmatch(name):
        raise BadName(f"invalid name {name!r}; expected {_NAME.pattern}")
    return name


def split_id(identity: str) -> tuple[str, str]:
    """Return name and version of an id; raises `BadName` if one of them is invalid."""
    name, _, version = identity.partition("/")
    return check_name(name), check_name(version)


def _ambiguity(wanted: str, matches: list[Version]) -> str:
    """Return an error message that lists the versions called `wanted`, newest first."""
    ids = [version.id for version in sorted(matches, key=_age, reverse=True)]
    more = f" and {len(ids) - _MAX_LISTED} older" if len(ids) > _MAX_LISTED else ""
    return f"{wanted!r} names {len(ids)} versions, newest first: {', '.join(ids[:_MAX_LISTED])}{more}"


def _age(version: Version) -> tuple[str, float]:
    """Return a value that orders versions by their day, and those of one day by the time of their manifest."""
    with suppress(OSError):
        return version.version[:8], (version.path / manifest.CHECKSUMS_FILE).stat().st_mtime
    return version.version[:8], 0.0


def _directories(path: Path) -> list[str]:
    """Return the names of the directories in `path`, sorted; none if it does not exist or may not be read."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _remove_leftover(residue: Path) -> None:
    if residue.is_dir() and not residue.is_symlink():
        shutil.rmtree(residue)
    else:
        residue.unlink()


def _why_not_a_link(path: Path) -> str:
    """Return why a path that is not a symbolic link is not an alias; copies often lose links."""
    kind = disk.kind_of(os.lstat(path).st_mode)
    lost = "zip, cp -rL, rsync without -l and git with core.symlinks=false make copies without links"
    first = "" if kind == "a file" else "remove it, then "
    command = f"`ln -sfn models/NAME/VERSION {path.name}`"
    return f"is {kind}, not a symbolic link ({lost}): {first}{command} there makes it one"


def _parse_move(line: bytes) -> Move | None:
    """Return the move in a line of the ledger, or None if the line is invalid."""
    try:
        return Move.from_dict(json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff")))
    except (TypeError, ValueError, RecursionError):
        return None


def _append(ledger: BufferedRandom, line: str) -> None:
    """Append a line, durably, even after a line that a crash cut short."""
    size = ledger.seek(0, os.SEEK_END)
    if size and os.pread(ledger.fileno(), 1, size - 1) != b"\n":
        line = "\n" + line
    ledger.write(line.encode())
    ledger.flush()
    os.fsync(ledger.fileno())


def _is_version_id(text: Any) -> bool:
    name, _, version = text.partition("/") if isinstance(text, str) else ("", "", "")
    return bool(_NAME.fullmatch(name) and _NAME.fullmatch(version))


def _replace_surrogates(member: Any) -> Any:
    """Return a member of a move with lone surrogates in its strings replaced, so that it can be encoded in UTF-8."""
    if isinstance(member, list):
        return [_replace_surrogates(each) for each in member]
    return member.encode(errors="replace").decode() if isinstance(member, str) else member


def _current_user() -> str:
    try:
        return getpass.getuser()
    # a user of a container may have no name
    except (KeyError, OSError):
        return str(os.getuid())


def main(arguments: list[str]) -> int:
    """Move an alias, with the registry of LVM_REGISTRY: `rollback ALIAS` or `unset ALIAS`; return the exit status."""
    if len(arguments) != 2 or arguments[0] not in ("rollback", "unset"):
        print("usage: python -m models.registry rollback|unset ALIAS", file=sys.stderr)
        return 2
    action, alias = arguments
    registry = Registry(Path(os.environ.get("LVM_REGISTRY") or "artifacts/lvm"))
    try:
        move = registry.unset(alias) if action == "unset" else registry.rollback(alias)
        skipped = registry.read_ledger().skipped
    except RegistryError as error:
        print(error, file=sys.stderr)
        return 75 if isinstance(error, RegistryLocked | AliasMoved) else 1
    except OSError as error:
        print(error, file=sys.stderr)
        return 74
    print(f"{move.alias}: {move.before or 'nothing'} -> {move.after or 'nothing'}")
    if skipped:
        print(f"invalid lines in the ledger: {skipped}", file=sys.stderr)
    return 0
