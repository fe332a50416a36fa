"""Versions and aliases in an object store, at any URL that fsspec opens: pushed there, mirrored in a registry here.

Layout below the URL: `models/<name>/<version>/<file>`, as in a registry, and `aliases/<alias>.json`, an object in place
of the link that no such store has. It is written last, so that what it names is whole. Nothing that is read there is
believed: names are held to the registry's rule, sums to the digest that the alias tells, files to the sums.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models.registry import disk, manifest
from models.registry.alias import ALIASES, Alias
from models.registry.manifest import Corrupt
from models.registry.registry import AliasMoved, Move, Registry, Version

CACHE_DIRECTORY = Path("~/.cache/lvm")
_MAX_BYTES = 1 << 20  # bytes of what says where an alias points, and of sums
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SECRET = re.compile(r"(?<=//)[^/\s]*@|\?\S*")  # of whoever puts a password or a signature into a URL
_LOCK, _ALIASES = ".mirror", "aliases"


class UnsupportedRemote(Exception):
    """No store can be opened at that URL here."""


class RemoteUnavailable(Exception):
    """The store does not answer, or not with what it was asked for."""


class BadAliasRecord(ValueError):
    """What a store says of an alias is not what is pushed there."""


def is_url(registry: str) -> bool:
    """Whether a registry is in an object store rather than in a directory."""
    return "://" in registry


def local_directory(registry: str, cache: Path) -> Path:
    """Return the directory of versions and aliases: the registry, or where below `cache` its store is mirrored.

    A URL with another secret is of the same store.
    """
    if not is_url(registry):
        return Path(registry)
    return cache.expanduser() / manifest.digest(without_secret(registry).encode())[:12]


@dataclass(frozen=True)
class AliasRecord:
    """What a store says of an alias: the last move, and the digest of the sums of the version it went to."""

    move: Move
    sha256: str

    def to_json(self) -> bytes:
        """Return it as an object of the store."""
        return json.dumps({"version": self.move.after, "sha256": self.sha256, "move": asdict(self.move)}).encode()

    @classmethod
    def from_json(cls, said: bytes) -> AliasRecord:
        """Read an object of the store.

        Raises:
            BadAliasRecord: it is not one that `to_json` makes.
        """
        try:
            found = json.loads(said)
            pointer = cls(Move.from_dict(found["move"]), found["sha256"])
            if not _SHA256.fullmatch(pointer.sha256):
                raise ValueError("a digest has 64 hexadecimal digits")
            return pointer
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise BadAliasRecord(f"the store's word on an alias cannot be read: {error}") from error


class RemoteRegistry:
    """Versions and aliases below a URL."""

    def __init__(self, url: str) -> None:
        self._url, self.name = url, without_secret(url)
        try:
            from fsspec import get_filesystem_class
            from fsspec.utils import get_protocol

            get_filesystem_class(get_protocol(url))
        except (ImportError, ValueError) as error:
            raise UnsupportedRemote(f"cannot open {self.name}: {error}") from error

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        """The file system and the path in it. Some connect here: it is made when first asked, anew after a fault."""
        from fsspec.core import url_to_fs

        files, path = url_to_fs(self._url, skip_instance_cache=True)
        return files, path.rstrip("/")

    def read(self, alias: str) -> bytes | None:
        """Return what the store says of an alias, None where it says nothing; raises `RemoteUnavailable`.

        Of what is no file, in a store on a disk, nothing is returned that `Pointer.of` could read.
        """
        return self._read(f"{_ALIASES}/{alias}.json")

    def fetch(self, identity: str, name: str, to: Path) -> None:
        """Copy a file of a version to a path.

        Raises:
            Corrupt: the store has no such file.
            RemoteUnavailable: it does not answer.
        """
        with self._connection() as (files, root):
            try:
                files.get_file(f"{root}/models/{identity}/{name}", str(to))
            except FileNotFoundError as error:
                raise Corrupt(f"{name} of {identity} is missing in {self.name}") from error

    def push(self, registry: Registry, *, force: bool = False) -> dict[str, AliasRecord]:
        """Publish what a registry's aliases point at, whole versions first; return the aliases that changed.

        Each version is read back and held to its sums before an alias names it.

        Raises:
            Corrupt: a version is damaged, here or by the way.
            AliasMoved: an alias was moved there by another registry, and this is not to `force` it back.
            RemoteUnavailable: the store does not answer, or takes nothing.
        """
        pointers = {alias: _alias_record(registry, alias) for alias in registry.aliases()}
        for pointer in pointers.values():
            self._put_version(registry.find(pointer.move.after), pointer.sha256)
        told = {alias: self.read(alias) for alias in {**pointers, Alias.CANDIDATE: None}}
        changed = {alias: pointer for alias, pointer in pointers.items() if told[alias] != pointer.to_json()}
        is_dismissed = Alias.CANDIDATE not in pointers and told[Alias.CANDIDATE] is not None
        if not force:
            self._check_not_overwritten(
                registry, [told[alias] for alias in (*changed, *[Alias.CANDIDATE] * is_dismissed)]
            )
        for alias, pointer in changed.items():
            self._put_alias(alias, pointer.to_json())
        if is_dismissed:
            with self._connection() as (files, root):
                files.rm_file(f"{root}/{_ALIASES}/{Alias.CANDIDATE}.json")
        return changed

    def _check_not_overwritten(self, registry: Registry, told: Iterable[bytes | None]) -> None:
        """Raise `AliasMoved` where what is told of an alias is a move that the registry's ledger does not know."""
        known = registry.ledger()
        for said in filter(None, told):
            with suppress(BadAliasRecord):  # nobody's, and mended by a push
                move = AliasRecord.from_json(said).move
                if move.time and move not in known:  # else set by hand
                    by = f"{move.alias} was moved to {move.after} by {move.who}, {move.time}"
                    raise AliasMoved(f"{self.name}: {by}, which is not in {registry.root}: push from there, or --force")

    def _put_version(self, version: Version, seal: str) -> None:
        at = f"models/{version.id}"
        if self._read(f"{at}/{manifest.CHECKSUMS_FILE}") == disk.read(
            version.path / manifest.CHECKSUMS_FILE, _MAX_BYTES
        ):
            return  # they went last
        with self._connection() as (files, root):
            files.makedirs(f"{root}/{at}", exist_ok=True)
            for name in (*sorted(manifest.file_names(version.path)), manifest.CHECKSUMS_FILE):
                files.put_file(str(version.path / name), f"{root}/{at}/{name}")
        with TemporaryDirectory(prefix="lvm-") as back:
            manifest.download(Path(back) / "files", seal, partial(self.fetch, version.id))

    def _put_alias(self, alias: str, said: bytes) -> None:
        with self._connection() as (files, root):
            files.makedirs(f"{root}/{_ALIASES}", exist_ok=True)
            files.pipe_file(f"{root}/{_ALIASES}/{alias}.json", said)

    def _read(self, at: str) -> bytes | None:
        with self._connection() as (files, root):
            try:
                if _is_not_a_small_file(files, f"{root}/{at}"):
                    return b""
                said: bytes = files.cat_file(f"{root}/{at}")
            except FileNotFoundError:
                return None
            return said

    @contextmanager
    def _connection(self) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the path in it; every kind of store has errors of its own."""
        try:
            yield self._filesystem
        except Corrupt:
            raise
        except Exception as error:
            vars(self).pop("_opened", None)
            raise RemoteUnavailable(without_secret(f"{self.name}: {type(error).__name__}: {error}")) from error


class RegistrySync:
    """A registry here that follows a store; several processes may follow in the same one.

    `check(alias, version)` raises where a version must not be served under an alias.
    """

    def __init__(self, store: RemoteRegistry, registry: Registry, check: Callable[[str, Version], object]) -> None:
        self.remote, self.registry, self._check = store, registry, check

    def poll(self) -> dict[str, bytes | None]:
        """Return what the store says of every alias; raises `RemoteUnavailable`, also where it says nothing at all."""
        said: dict[str, bytes | None] = {alias: self.remote.read(alias) for alias in ALIASES}
        if not any(said.values()):
            raise RemoteUnavailable(f"{self.remote.name}: no alias is there: `lvm push` publishes them")
        return said

    def apply(self, alias: str, said: bytes | None) -> None:
        """Do what the store says of an alias, once: get the version, verify it, check it, move the link.

        What this machine did with the alias since, as going back by itself, stands until the store says something new.

        Raises:
            BadAliasRecord, Corrupt: what the store has is not what was pushed; the alias stays.
            RegistryLocked: the registry is being changed; it may be tried again.
            RemoteUnavailable: it does not answer.
            Exception: what `check` raised; the alias stays.
        """
        if self._is_applied(alias, said):
            return
        with self._locked():
            if self._is_applied(alias, said):
                return
            if said is None:
                self._remove_alias(alias)
            else:
                self._install(alias, AliasRecord.from_json(said))
                self._store_record(alias, said)

    def _install(self, alias: str, pointer: AliasRecord) -> None:
        self.registry.remove_partial_versions()  # who follows is alone
        move, fetch = pointer.move, partial(self.remote.fetch, pointer.move.after)
        version = self.registry.download(move.after, pointer.sha256, fetch)
        self._check(alias, version)
        if self.registry.aliases().get(alias) != version.id:
            why = f"{move.why} ({move.who}, {move.time})".strip()
            self.registry.point(alias, version, why=why, action=move.action)

    def _is_applied(self, alias: str, said: bytes | None) -> bool:
        if said is None:
            return alias != Alias.CANDIDATE or not self._record_path(alias).exists()
        try:
            return disk.read(self._record_path(alias), _MAX_BYTES) == said and alias in self.registry.aliases()
        except FileNotFoundError:
            return False

    def _store_record(self, alias: str, said: bytes) -> None:
        part = self._record_path(alias).with_suffix(".part")
        disk.make_directory(part.parent)
        part.unlink(missing_ok=True)
        with open(disk.open_or_create(part, os.O_WRONLY), "wb") as file:
            file.write(said)
        os.replace(part, self._record_path(alias))

    def _remove_alias(self, alias: str) -> None:
        (self.registry.root / alias).unlink(missing_ok=True)
        self._record_path(alias).unlink()

    def _record_path(self, alias: str) -> Path:
        return self.registry.root / _ALIASES / f"{alias}.json"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.registry.root.mkdir(parents=True, exist_ok=True)
        with open(disk.open_or_create(self.registry.root / _LOCK, os.O_RDWR), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _alias_record(registry: Registry, alias: str) -> AliasRecord:
    """Return what a store is to say of an alias: its last move, or one without a reason where it was set by hand."""
    version = registry.resolve(alias)
    moves = [move for move in registry.ledger() if (move.alias, move.after) == (alias, version.id)]
    move: Any = moves[-1] if moves else Move("", "", alias, "promote", None, version.id, "set by hand")
    return AliasRecord(move, manifest.read_digest(version.path))


def _is_not_a_small_file(files: Any, path: str) -> bool:
    """Whether a store on a disk has no file there, but a named pipe or the like, or one that is too large."""
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(files, LocalFileSystem) or not os.path.lexists(path):
        return False
    return not os.path.isfile(path) or os.path.getsize(path) > _MAX_BYTES


def without_secret(text: str) -> str:
    """Return a text without what precedes an @ in the URLs in it, and without their queries."""
    return _SECRET.sub("", text)
