"""A sealed directory: files beside a SHA256SUMS, written once, verified as it is read.

Standard library only, so that a bad day needs nothing else. `sha256sum -c SHA256SUMS` checks it too.

`read` holds the bytes that it hashed: whatever happens to the files, they are what is used. `mapped` leaves them
on disk: hash and mapping go through one descriptor, so a file that is renamed, replaced or deleted afterwards changes
nothing, but one that is written in place shows, and one that is cut short kills the process that reads the part cut
off. Nothing here writes in place; file permissions must keep others from it.
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
Fetch = Callable[[str, Path], None]  # puts the file of a name at a path
_BLOCK_BYTES = 1 << 20  # bytes
_MAX_MANIFEST_BYTES = 1 << 20  # bytes
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")


class Corrupt(ValueError):
    """A sealed directory does not hold what its sums say."""


def digest(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_files(directory: Path, files: Mapping[str, bytes | Path]) -> str:
    """Write `files` and their sums into the new `directory`, durably; return the digest of the sums.

    A file is given as its bytes, or as the path of a file to copy.
    """
    _make_directory(directory)
    sums = {name: _write_file(directory / name, data) for name, data in files.items()}
    seal = _write_file(directory / CHECKSUMS_FILE, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())
    sync_directory(directory)
    return seal


def download(directory: Path, seal: str, fetch: Fetch) -> None:
    """Have `fetch` fill the new `directory`, durably: the sums, which must have the digest `seal`, then what they name.

    Raises:
        Corrupt: a file is not what its sum says, or the sums are not those of `seal`; no other name was asked for.
    """
    _make_directory(directory)
    _download_file(directory / CHECKSUMS_FILE, seal, fetch)
    for name, expected in _read_checksums(directory).items():
        _download_file(directory / name, expected, fetch)
    sync_directory(directory)


def is_intact(directory: Path, seal: str) -> bool:
    """Whether every file of a directory is there and as the sums of the digest `seal` say."""
    try:
        return read_digest(directory) == seal and bool(map_files(directory))
    except Corrupt:
        return False


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file that the sums name, each checked against its sum.

    Raises:
        Corrupt: the sums are missing or malformed, or a file is missing, a link, or altered.
    """
    return {name: _read_file(directory / name, expected) for name, expected in _read_checksums(directory).items()}


def map_files(directory: Path) -> dict[str, Buffer]:
    """Return every file that the sums name, hashed and then mapped into memory, read only; raises as `read` does."""
    return {name: _map_checked(directory / name, expected) for name, expected in _read_checksums(directory).items()}


def map_file(path: Path) -> Buffer:
    """Return a file mapped into memory, read only, on trust; raises `OSError`."""
    with open(disk.open_regular(path), "rb") as file:
        return _map(file)


def file_names(directory: Path) -> Set[str]:
    """Return the names of the files that the sums name; raises `Corrupt` where these are not to be read."""
    return _read_checksums(directory).keys()


def read_digest(directory: Path) -> str:
    """Return the digest of the sums: the identity of everything in the directory."""
    return digest(_read_manifest(directory))


def sync_directory(directory: Path) -> None:
    """Make a directory's entries durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_checksums(directory: Path) -> dict[str, str]:
    *lines, end = _read_manifest(directory).decode("ascii", "replace").split("\n")
    matches = [_LINE.fullmatch(line) for line in lines]
    if None in matches or end or not lines:
        cause = (
            "; its lines end in CRLF, as git with core.autocrlf leaves them" if lines[:1] and "\r" in lines[0] else ""
        )
        raise Corrupt(f"{directory / CHECKSUMS_FILE} is not a list of sums{cause}")
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
        _check(Path(path.name), hashlib.file_digest(file, "sha256").hexdigest(), expected)
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
    _check(path, digest(data), expected)
    return data


def _map_checked(path: Path, expected: str) -> Buffer:
    try:
        with _open(path) as file:
            _check(path, hashlib.file_digest(file, "sha256").hexdigest(), expected)
            return _map(file)
    except OSError as error:
        raise Corrupt(f"{path}: {error.strerror}") from error


def _map(file: BufferedReader) -> Buffer:
    """Map what can be mapped: an empty file cannot."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise Corrupt(f"{path} was altered: sha256 {found[:12]}..., sealed as {expected[:12]}...")


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
