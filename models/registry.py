"""The registry: versions, the aliases that point at them, and the ledger of every move.

Layout below the root: `models/<name>/<version>/` (sealed directories), `<alias>` (a relative
symbolic link to one of them), `ledger.jsonl` (one move a line, only ever appended to).
Standard library only: `python -m models.registry rollback ALIAS` works when nothing else does.
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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from models import sealed

ALIASES = ("primary", "fallback", "candidate", "retriever")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_LEDGER, _LOCK, _PART = "ledger.jsonl", ".lock", ".part-"
_NO_LINK = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)  # there is none; anything else may be a share that is away


class RegistryError(Exception):
    """The registry cannot do what was asked."""


class BadName(RegistryError):
    """A name that no model may have."""


class UnknownVersion(RegistryError):
    """No version, or no alias, has that name."""


class NothingToRollBack(RegistryError):
    """The ledger knows no earlier version of the alias."""


class LockHeld(RegistryError):
    """Somebody else is changing the registry right now."""


class Overtaken(RegistryError):
    """Somebody else has moved an alias since it was looked at."""


@dataclass(frozen=True)
class Move:
    """One line of the ledger: who moved an alias, when, from where to where, why, and over which objections."""

    time: str
    who: str
    alias: str
    action: str  # promote | rollback
    before: str | None
    after: str
    why: str
    overrode: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Version:
    """One immutable version: `id` is `<name>/<version>`, `path` its directory."""

    name: str
    version: str
    path: Path

    @property
    def id(self) -> str:
        """The name that aliases, the ledger and the command line use."""
        return f"{self.name}/{self.version}"


class Registry:
    """Versions and aliases below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def versions(self) -> list[Version]:
        """Return every complete version, by name, then by age."""
        found = sorted(self.root.glob(f"models/*/*/{sealed.SUMS}"))
        versions = (self._version(path.parent.parent.name, path.parent.name) for path in found)
        return [version for version in versions if version]

    def find(self, wanted: str) -> Version:
        """Return the version that `wanted` means: an alias, `name/version`, or a version alone.

        Raises:
            UnknownVersion: nothing, or more than one version, is meant; no path outside is looked at.
        """
        if wanted in ALIASES:
            return self.resolve(wanted)
        matches = [v for v in self.versions() if wanted in (v.id, v.version)]
        if len(matches) != 1:
            raise UnknownVersion(f"{'no' if not matches else 'more than one'} version {wanted!r} in {self.root}")
        return matches[0]

    def resolve(self, alias: str) -> Version:
        """Return the version that `alias` points at, reading the link once.

        Raises:
            UnknownVersion: the alias is not set, or does not point at a version of this registry.
            OSError: the link cannot be read, as where the registry is on a share that is away.
        """
        target = self._target(alias)
        version = self._version(*target.split("/")) if target else None
        if version is None:
            raise UnknownVersion(f"alias {alias!r} is not set in {self.root}")
        return version

    def aliases(self) -> dict[str, str]:
        """Return the id of the version behind every alias that is set."""
        targets = {alias: self._target(alias) for alias in ALIASES}
        return {alias: target for alias, target in targets.items() if target}

    def add(self, name: str, files: Mapping[str, bytes | Path]) -> Version:
        """Store `files`, bytes or paths, as a new version of `name`: written aside, synced, then renamed into place.

        The version is the date and the digest of the sums, so equal files make one version a day.

        Raises:
            BadName: `name` is not a plain lower-case name.
        """
        check_name(name)
        home = self.root / "models" / name
        home.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=home))
        try:
            return self._rename(part / "files", name, sealed.write(part / "files", files))
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a crash left of versions that were on their way; to be called where nobody adds one."""
        for residue in self.root.glob(f"models/*/{_PART}*"):
            shutil.rmtree(residue, ignore_errors=True)

    def adopt(self, identity: str, seal: str, fetch: sealed.Fetch) -> Version:
        """Store the version `identity`, made elsewhere, whose files `fetch` gets; what is here and whole is kept.

        `seal` is the digest of its sums. Callers see to it that two do not adopt the same version at a time.

        Raises:
            BadName: the id is not that of a version with these sums.
            Corrupt: a file is not what its sum says; nothing is stored.
        """
        name, version = split_id(identity)
        if not version.endswith(f"-{seal[:12]}"):
            raise BadName(f"{identity!r} is not the id of a version sealed as {seal[:12]}...")
        path = self.root / "models" / name / version
        if sealed.is_whole(path, seal):
            return Version(name, version, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=path.parent))
        try:
            sealed.receive(part / "files", seal, fetch)
            if path.exists():
                os.rename(path, part / "spoiled")
            os.rename(part / "files", path)
            sealed.sync(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return Version(name, version, path)

    def point(
        self,
        alias: str,
        version: Version,
        *,
        why: str = "",
        action: str = "promote",
        overrode: Sequence[str] = (),
        since: Mapping[str, str | None] | None = None,
    ) -> Move:
        """Swap `alias` to `version` atomically and write the move, with the objections it `overrode`, to the ledger.

        `since` says what aliases pointed at when the move was judged: where one points elsewhere by now, nothing moves.

        Raises:
            ValueError: no alias has that name.
            LockHeld: another promotion is under way.
            Overtaken: an alias has moved since it was judged.
        """
        if alias not in ALIASES:
            raise ValueError(f"{alias!r} is no alias: choose from {', '.join(ALIASES)}")
        with self._lock():
            for known, target in (since or {}).items():
                if self._target(known) != target:
                    raise Overtaken(f"{known} points at {self._target(known)}, not at {target} any more: judge again")
            return self._swap(alias, version, why, action, overrode)

    def rollback(self, alias: str, *, why: str = "") -> Move:
        """Point `alias` back at the version before the one it serves; twice goes two back.

        Raises:
            NothingToRollBack: the ledger names no earlier version.
            UnknownVersion: the earlier version is no longer there.
            LockHeld: another promotion is under way.
        """
        with self._lock():
            return self._swap(alias, self.find(self._previous(alias)), why, "rollback")

    def ledger(self) -> list[Move]:
        """Return every move, oldest first; a line torn by a crash is passed over."""
        return list(self._moves())

    def _moves(self) -> Iterator[Move]:
        with suppress(FileNotFoundError), open(self.root / _LEDGER, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError, TypeError):
                    yield Move(**json.loads(line))

    def _previous(self, alias: str) -> str:
        history: list[str] = []
        for move in self._moves():
            if move.alias != alias:
                continue
            if move.before and history[-1:] != [move.before]:  # the first known, or a move that a crash left out
                history.append(move.before)
            while move.action == "rollback" and len(history) > 1 and history[-1] != move.after:
                history.pop()
            if history[-1:] != [move.after]:
                history.append(move.after)
        earlier = [target for target in history if target != self._target(alias)]
        if not earlier:
            raise NothingToRollBack(f"the ledger knows no earlier version of {alias!r}")
        return earlier[-1]

    def _swap(self, alias: str, version: Version, why: str, action: str, overrode: Sequence[str] = ()) -> Move:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        move = Move(now, _who(), alias, action, self._target(alias), version.id, why, list(overrode))
        for residue in self.root.glob(f"{_PART}*"):  # of a crash: who swaps now has the lock
            residue.unlink()
        links = self.root / f"{_PART}{alias}", self.root / f"{_PART}{alias}-before"
        links[0].symlink_to(os.path.relpath(version.path, self.root))
        links[1].symlink_to(os.readlink(self.root / alias) if move.before else "nowhere")
        os.replace(links[0], self.root / alias)
        sealed.sync(self.root)
        try:
            self._append(json.dumps(asdict(move)) + "\n")
        except OSError:  # no move without its line; what takes it back is there already
            self._take_back(alias, links[1], move)
            raise
        links[1].unlink()
        return move

    def _take_back(self, alias: str, link: Path, move: Move) -> None:
        if move.before:
            os.replace(link, self.root / alias)
        else:
            (self.root / alias).unlink()
        sealed.sync(self.root)

    def _append(self, line: str) -> None:
        with open(self.root / _LEDGER, "ab+") as ledger:
            if ledger.tell() and not self._ends_whole():
                line = "\n" + line
            ledger.write(line.encode())
            ledger.flush()
            os.fsync(ledger.fileno())

    def _ends_whole(self) -> bool:
        with open(self.root / _LEDGER, "rb") as ledger:
            ledger.seek(-1, os.SEEK_END)
            return ledger.read() == b"\n"

    def _rename(self, part: Path, name: str, seal: str) -> Version:
        version = f"{datetime.now(UTC):%Y%m%d}-{seal[:12]}"
        path = self.root / "models" / name / version
        if not path.exists():
            os.rename(part, path)
            sealed.sync(path.parent)
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
        return Version(name, version, path) if inside and (path / sealed.SUMS).is_file() else None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.root / _LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockHeld(f"another promotion holds {self.root / _LOCK}: try again") from error
            yield


def check_name(name: str) -> str:
    """Return the name of a model; raises `BadName` where it is not a plain lower-case one."""
    if not _NAME.fullmatch(name):
        raise BadName(f"{name!r} is no name for a model: want {_NAME.pattern}")
    return name


def split_id(identity: str) -> tuple[str, str]:
    """Return name and version of an id; raises `BadName` where it is not of two plain names."""
    name, _, version = identity.partition("/")
    return check_name(name), check_name(version)


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def main(arguments: list[str]) -> int:
    """Roll an alias back with nothing but Python: `rollback ALIAS`; the registry from LVM_REGISTRY."""
    if len(arguments) != 2 or arguments[0] != "rollback":
        print("usage: python -m models.registry rollback ALIAS", file=sys.stderr)
        return 2
    registry = Registry(Path(os.environ.get("LVM_REGISTRY", "artifacts/lvm")))
    try:
        move = registry.rollback(arguments[1])
    except RegistryError as error:
        print(error, file=sys.stderr)
        return 75 if isinstance(error, LockHeld | Overtaken) else 1
    except OSError as error:
        print(error, file=sys.stderr)
        return 74
    print(f"{move.alias}: {move.before} -> {move.after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
