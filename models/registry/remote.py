"""A registry in an object store, at any URL that fsspec opens: pushed to, and synced to a local registry.

Layout below the URL: `models/<name>/<version>/<file>` as in a registry, and one object `aliases/<alias>.json` per
alias, since object stores have no links. An alias is written last, so the version that it names is complete. Nothing
in the store is trusted: names are checked by the registry's rules, the manifest by the digest in the alias record,
files by the manifest.
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
# of an alias record, and of a manifest
_MAX_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# a password or a signature in a URL
_SECRET = re.compile(r"(?<=//)[^/\s]*@|\?\S*")
_LOCK = ".mirror"
_ALIASES = "aliases"


class UnsupportedRemote(Exception):
    """No installed package opens this URL."""


class RemoteUnavailable(Exception):
    """The remote registry does not answer, or answers with an error."""


class BadAliasRecord(ValueError):
    """The object of an alias in the remote registry is invalid."""


def is_url(registry: str) -> bool:
    """Return whether a registry is in an object store rather than in a directory."""
    return "://" in registry


def local_directory(registry: str, cache: Path) -> Path:
    """Return the directory of a registry; for a URL, its local copy below `cache`.

    The copy does not depend on the secrets in the URL.
    """
    if not is_url(registry):
        return Path(registry)
    return cache.expanduser() / manifest.digest(without_secret(registry).encode())[:12]


@dataclass(frozen=True)
class AliasRecord:
    """The object of an alias in a remote registry: its last move, and the digest of the manifest of that version."""

    move: Move
    sha256: str

    @property
    def version(self) -> str:
        """The id of the version."""
        assert self.move.after is not None
        return self.move.after

    def to_json(self) -> bytes:
        """Return the content of the object."""
        return json.dumps({"version": self.move.after, "sha256": self.sha256, "move": asdict(self.move)}).encode()

    @classmethod
    def from_json(cls, content: bytes) -> AliasRecord:
        """Read the content of an object.

        Raises:
            BadAliasRecord: `to_json` does not make such content.
        """
        try:
            found = json.loads(content)
            record = cls(Move.from_dict(found["move"]), found["sha256"])
            if not _SHA256.fullmatch(record.sha256):
                raise ValueError("sha256: expected 64 hexadecimal digits")
            if record.move.after is None:
                raise ValueError("move: expected one to a version")
            return record
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise BadAliasRecord(f"invalid alias record in the object store: {error}") from error


class RemoteRegistry:
    """Versions and aliases below a URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = without_secret(url)
        try:
            from fsspec import get_filesystem_class
            from fsspec.utils import get_protocol

            get_filesystem_class(get_protocol(url))
        except (ImportError, ValueError) as error:
            raise UnsupportedRemote(f"cannot open {self.name}: {error}") from error

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        """The file system and the path in it. Some connect here, so it is opened late, and again after a failure."""
        from fsspec.core import url_to_fs

        files, path = url_to_fs(self._url, skip_instance_cache=True)
        return files, path.rstrip("/")

    def read(self, alias: str) -> bytes | None:
        """Return the content of the object of an alias, None if there is none; raises `RemoteUnavailable`.

        If a store on a disk has something other than a small regular file there, return invalid content.
        """
        return self._read(f"{_ALIASES}/{alias}.json")

    def fetch(self, identity: str, name: str, to: Path) -> None:
        """Copy a file of a version to a path.

        Raises:
            Corrupt: the file is missing.
            RemoteUnavailable: the store does not answer.
        """
        with self._connection() as (files, root):
            try:
                files.get_file(f"{root}/models/{identity}/{name}", str(to))
            except FileNotFoundError as error:
                raise Corrupt(f"{name} of {identity} is missing in {self.name}") from error

    def push(self, registry: Registry, *, force: bool = False) -> dict[str, AliasRecord]:
        """Publish the aliases of a registry and the versions behind them; return the aliases that changed.

        Versions go first. Each is read back and verified before an alias names it.

        Raises:
            Corrupt: a version is damaged, locally or in transfer.
            AliasMoved: another registry moved an alias there, and `force` is not set.
            RemoteUnavailable: the store does not answer, or rejects writes.
        """
        records = {alias: _alias_record(registry, alias) for alias in registry.aliases()}
        for record in records.values():
            self._put_version(registry.find(record.version), record.sha256)
        before = {alias: self.read(alias) for alias in {**records, Alias.CANDIDATE: None}}
        changed = {alias: record for alias, record in records.items() if before[alias] != record.to_json()}
        is_dismissed = Alias.CANDIDATE not in records and before[Alias.CANDIDATE] is not None
        if not force:
            overwritten = (*changed, *[Alias.CANDIDATE] * is_dismissed)
            self._check_not_overwritten(registry, [before[alias] for alias in overwritten])
        for alias, record in changed.items():
            self._put_alias(alias, record.to_json())
        if is_dismissed:
            with self._connection() as (files, root):
                files.rm_file(f"{root}/{_ALIASES}/{Alias.CANDIDATE}.json")
        return changed

    def _check_not_overwritten(self, registry: Registry, contents: Iterable[bytes | None]) -> None:
        """Raise `AliasMoved` if a record of the store holds a move that the registry's ledger lacks."""
        known = registry.ledger()
        for content in filter(None, contents):
            # an invalid record belongs to no registry; the push repairs it
            with suppress(BadAliasRecord):
                move = AliasRecord.from_json(content).move
                # a move without time was made by hand, without a line in a ledger
                if move.time and move not in known:
                    by = f"{move.alias} was moved to {move.after} by {move.who}, {move.time}"
                    raise AliasMoved(f"{self.name}: {by}, which is not in {registry.root}: push from there, or --force")

    def _put_version(self, version: Version, sha256: str) -> None:
        at = f"models/{version.id}"
        local = disk.read(version.path / manifest.CHECKSUMS_FILE, _MAX_BYTES)
        # the manifest is written last, so a version with the same manifest is complete
        if self._read(f"{at}/{manifest.CHECKSUMS_FILE}") == local:
            return
        with self._connection() as (files, root):
            files.makedirs(f"{root}/{at}", exist_ok=True)
            for name in (*sorted(manifest.file_names(version.path)), manifest.CHECKSUMS_FILE):
                files.put_file(str(version.path / name), f"{root}/{at}/{name}")
        with TemporaryDirectory(prefix="lvm-") as back:
            manifest.download(Path(back) / "files", sha256, partial(self.fetch, version.id))

    def _put_alias(self, alias: str, content: bytes) -> None:
        with self._connection() as (files, root):
            files.makedirs(f"{root}/{_ALIASES}", exist_ok=True)
            files.pipe_file(f"{root}/{_ALIASES}/{alias}.json", content)

    def _read(self, at: str) -> bytes | None:
        with self._connection() as (files, root):
            try:
                if not _is_readable(files, f"{root}/{at}"):
                    return b""
                content: bytes = files.cat_file(f"{root}/{at}")
            except FileNotFoundError:
                return None
            return content

    @contextmanager
    def _connection(self) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the path in it; turn the errors of every kind of store into `RemoteUnavailable`."""
        try:
            yield self._filesystem
        except Corrupt:
            raise
        except Exception as error:
            vars(self).pop("_filesystem", None)
            raise RemoteUnavailable(without_secret(f"{self.name}: {type(error).__name__}: {error}")) from error


class RegistrySync:
    """Copies the aliases of a remote registry, and their versions, to a local one; several processes may share that.

    `check(alias, version)` raises if a version must not be served under an alias.
    """

    def __init__(self, remote: RemoteRegistry, registry: Registry, check: Callable[[str, Version], object]) -> None:
        self.remote = remote
        self.registry = registry
        self._check = check

    def poll(self) -> dict[str, bytes | None]:
        """Return the content of the object of every alias; raises `RemoteUnavailable`, also if there are none."""
        found: dict[str, bytes | None] = {alias: self.remote.read(alias) for alias in ALIASES}
        if not any(found.values()):
            raise RemoteUnavailable(f"{self.remote.name}: no alias is there: `lvm push` publishes them")
        return found

    def apply(self, alias: str, content: bytes | None) -> None:
        """Apply the record of an alias once: download the version, verify it, check it, move the local alias.

        Local moves of the alias since then, for example an automatic rollback, stay until the record changes.

        Raises:
            BadAliasRecord, Corrupt: the store holds something other than a push made; the alias stays.
            RegistryLocked: another process is changing the local registry; try again.
            RemoteUnavailable: the store does not answer.
            Exception: `check` raised it; the alias stays.
        """
        if self._is_applied(alias, content):
            return
        with self._locked():
            if self._is_applied(alias, content):
                return
            if content is None:
                self._remove_alias(alias)
            else:
                self._install(alias, AliasRecord.from_json(content))
                self._store_record(alias, content)

    def _install(self, alias: str, record: AliasRecord) -> None:
        # this process holds the lock of the local copy
        self.registry.remove_partial_versions()
        move = record.move
        version = self.registry.download(record.version, record.sha256, partial(self.remote.fetch, record.version))
        self._check(alias, version)
        if self.registry.aliases().get(alias) != version.id:
            why = f"{move.why} ({move.who}, {move.time})".strip()
            self.registry.point(alias, version, why=why, action=move.action)

    def _is_applied(self, alias: str, content: bytes | None) -> bool:
        if content is None:
            return alias != Alias.CANDIDATE or not self._record_path(alias).exists()
        try:
            return disk.read(self._record_path(alias), _MAX_BYTES) == content and alias in self.registry.aliases()
        except FileNotFoundError:
            return False

    def _store_record(self, alias: str, content: bytes) -> None:
        part = self._record_path(alias).with_suffix(".part")
        disk.make_directory(part.parent)
        part.unlink(missing_ok=True)
        with open(disk.open_or_create(part, os.O_WRONLY), "wb") as file:
            file.write(content)
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
    """Return the record of a local alias: its last move, or one without a time if the link was set by hand."""
    version = registry.resolve(alias)
    moves = [move for move in registry.ledger() if (move.alias, move.after) == (alias, version.id)]
    move: Any = moves[-1] if moves else Move("", "", alias, "promote", None, version.id, "set by hand")
    return AliasRecord(move, manifest.read_digest(version.path))


def _is_readable(files: Any, path: str) -> bool:
    """Return False if a store on a disk has a file there that is too large, or not a regular one."""
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(files, LocalFileSystem) or not os.path.lexists(path):
        return True
    return os.path.isfile(path) and os.path.getsize(path) <= _MAX_BYTES


def without_secret(text: str) -> str:
    """Return a text without user information and query strings in its URLs."""
    return _SECRET.sub("", text)
