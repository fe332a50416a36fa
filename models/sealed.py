"""A sealed directory: files beside a SHA256SUMS, written once, verified as it is read.

Standard library only, so that a bad day needs nothing else. `sha256sum -c SHA256SUMS` checks it too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")


class Corrupt(ValueError):
    """A sealed directory does not hold what its sums say."""


def digest(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write(directory: Path, files: Mapping[str, bytes]) -> str:
    """Write `files` and their sums into the new `directory`, durably; return the digest of the sums."""
    directory.mkdir()
    sums = "".join(f"{digest(files[name])}  {name}\n" for name in sorted(files)).encode()
    for name, data in {**files, SUMS: sums}.items():
        with open(directory / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync(directory)
    return digest(sums)


def read(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file that the sums name, each checked against its sum.

    Raises:
        Corrupt: the sums are missing or malformed, or a file is missing, a link, or altered.
    """
    return {name: _read_file(directory / name, expected) for name, expected in _sums(directory).items()}


def seal_of(directory: Path) -> str:
    """Return the digest of the sums: the identity of everything in the directory."""
    return digest(_read_bytes(directory / SUMS))


def sync(directory: Path) -> None:
    """Make a directory's entries durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sums(directory: Path) -> dict[str, str]:
    lines = _read_bytes(directory / SUMS).decode("ascii", "replace").removesuffix("\n").split("\n")
    matches = [_LINE.fullmatch(line) for line in lines]
    if None in matches:
        raise Corrupt(f"{directory / SUMS} is not a list of sums")
    return {match[2]: match[1] for match in matches if match}


def _read_file(path: Path, expected: str) -> bytes:
    data = _read_bytes(path)
    if digest(data) != expected:
        raise Corrupt(f"{path} was altered: sha256 {digest(data)[:12]}..., sealed as {expected[:12]}...")
    return data


def _read_bytes(path: Path) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()
    except OSError as error:
        raise Corrupt(f"{path}: {error.strerror}") from error
