"""The manifest of a version: SHA256SUMS, a list of the files in its directory and their checksums.

A directory is written once. Its files are verified each time they are read. `sha256sum -c SHA256SUMS` verifies them
too. Standard library only, so that a rollback needs nothing else.

`read_files` returns the bytes that it hashed, so later changes of the files have no effect. `map_files` leaves the
bytes on disk. It hashes and maps through one file descriptor, so a file that is renamed, replaced or deleted later
keeps its content. A file that is overwritten in place changes, and a file that is cut short kills the process that
reads the missing part. Nothing here writes in place. File permissions must keep other programs from doing so.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Set
from io import BufferedReader
from pathlib import Path

from models.registry import disk

CHECKSUMS_FILE = "SHA256SUMS"
Buffer = bytes | mmap.mmap
# Copies the file of a name to a path.
Fetch = Callable[[str, Path], None]
_BLOCK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")


class Corrupt(ValueError):
    """A file does not match its checksum, or the list of checksums is invalid."""


def digest(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_files(directory: Path, files: Mapping[str, bytes | Path]) -> str:
    """Write `files` and their checksums into the new `directory`, durably; return the digest of the checksums.

    A file is given as its bytes, or as the path of a file to copy.
    """
    _make_directory(directory)
    checksums = {name: _write_file(directory / name, data) for name, data in files.items()}
    lines = "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums))
    sha256 = _write_file(directory / CHECKSUMS_FILE, lines.encode())
    sync_directory(directory)
    return sha256


def download(directory: Path, sha256: str, fetch: Fetch) -> None:
    """Fill the new `directory` by `fetch`, durably: first the checksums, then the files that they name, and no others.

    Raises:
        Corrupt: the checksums do not have the digest `sha256`, or a file does not match its checksum.
    """
    _make_directory(directory)
    _download_file(directory / CHECKSUMS_FILE, sha256, fetch)
    for name, expected in _read_checksums(directory).items():
        _download_file(directory / name, expected, fetch)
    sync_directory(directory)


def is_intact(directory: Path, sha256: str) -> bool:
    """Return whether the checksums have the digest `sha256` and every file matches its checksum."""
    try:
        return read_digest(directory) == sha256 and bool(map_files(directory))
    except Corrupt:
        return False


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the verified bytes of every file in the manifest.

    Raises:
        Corrupt: the list of checksums is missing or malformed, or a file is missing, a link, or altered.
    """
    return {name: _read_file(directory / name, expected) for name, expected in _read_checksums(directory).items()}


def map_files(directory: Path) -> dict[str, Buffer]:
    """Return every file in the manifest, verified, then mapped into memory read-only; raises as `read_files`."""
    return {name: _map_verified(directory / name, expected) for name, expected in _read_checksums(directory).items()}


def map_file(path: Path) -> Buffer:
    """Return a file mapped into memory read-only, without verification; raises `OSError`."""
    with open(disk.open_regular(path), "rb") as file:
        return _map(file)


def file_names(directory: Path) -> Set[str]:
    """Return the names of the files in the manifest; raises `Corrupt` if it cannot be read."""
    return _read_checksums(directory).keys()


def read_digest(directory: Path) -> str:
    """Return the digest of the checksums, which identifies everything in the directory."""
    return digest(_read_manifest(directory))


def sync_directory(directory: Path) -> None:
    """Make the entries of a directory durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_checksums(directory: Path) -> dict[str, str]:
    *lines, end = _read_manifest(directory).decode("ascii", "replace").split("\n")
    matches = [_LINE.fullmatch(line) for line in lines]
    if None in matches or end or not lines:
        is_crlf = bool(lines) and "\r" in lines[0]
        cause = "; its lines end in CRLF, as git with core.autocrlf leaves them" if is_crlf else ""
        raise Corrupt(f"{directory / CHECKSUMS_FILE} is not a list of checksums{cause}")
    return {match[2]: match[1] for match in matches if match}


def _write_file(path: Path, data: bytes | Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "xb") as file:
        disk.inherit_permissions(file.fileno(), path.parent)
        for block in _blocks(data):
            sha256.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _download_file(path: Path, expected: str, fetch: Fetch) -> None:
    fetch(path.name, path)
    disk.inherit_permissions(path, path.parent)
    with _open(path) as file:
        _verify(Path(path.name), hashlib.file_digest(file, "sha256").hexdigest(), expected)
        os.fsync(file.fileno())


def _blocks(data: bytes | Path) -> Iterator[bytes]:
    if not isinstance(data, Path):
        yield data
        return
    with open(disk.open_regular(data), "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _read_file(path: Path, expected: str) -> bytes:
    data = _read_bytes(path)
    _verify(path, digest(data), expected)
    return data


def _map_verified(path: Path, expected: str) -> Buffer:
    try:
        with _open(path) as file:
            _verify(path, hashlib.file_digest(file, "sha256").hexdigest(), expected)
            return _map(file)
    except OSError as error:
        raise Corrupt(f"{path}: {error.strerror}") from error


def _map(file: BufferedReader) -> Buffer:
    # an empty file cannot be mapped
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _verify(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise Corrupt(f"{path} was altered: sha256 {found[:12]}..., expected {expected[:12]}...")


def _read_bytes(path: Path, limit: int = -1) -> bytes:
    try:
        with _open(path) as file:
            return file.read(limit)
    except OSError as error:
        raise Corrupt(f"{path}: {error.strerror}") from error


def _read_manifest(directory: Path) -> bytes:
    return _read_bytes(directory / CHECKSUMS_FILE, _MAX_MANIFEST_BYTES)


def _open(path: Path) -> BufferedReader:
    return open(disk.open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _make_directory(directory: Path) -> None:
    directory.mkdir()
    disk.inherit_permissions(directory, directory.parent)
