"""Files and directories of a registry: opened without blocking, shared with a group. Standard library only."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NONBLOCKING = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# The permissions that a new file or directory may take over from its parent; the owner can always write.
_FILE_MODE = 0o664
_DIRECTORY_MODE = 0o2775


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of the regular file at `path`; never blocks on a named pipe, a socket or a device.

    Raises:
        OSError: the file cannot be opened, or is not a regular file; the message says what it is.
    """
    try:
        handle = os.open(path, flags | _NONBLOCKING)
    except BlockingIOError:
        # Only a regular file can be leased by a file server, which then releases it soon.
        handle = os.open(path, (flags | _NONBLOCKING) & ~os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise _not_regular(path, os.lstat(path).st_mode) from error
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise _not_regular(path, mode)
    return handle


def open_or_create(path: Path, flags: int) -> int:
    """Return a descriptor of the regular file at `path`; a new one has the permissions of its directory.

    Raises:
        OSError: as `open_regular`.
    """
    with suppress(FileNotFoundError):
        # without O_CREAT: a sticky directory may reject it for the file of another user
        return open_regular(path, flags)
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_EXCL | _NONBLOCKING)
    except FileExistsError:  # another process was quicker
        return open_regular(path, flags)
    inherit_permissions(handle, path.parent)
    return handle


def read(path: Path, limit: int | None = None) -> bytes:
    """Return the bytes of the regular file at `path`.

    Raises:
        OSError: as `open_regular`; or the file has more than `limit` bytes.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit} bytes", str(path))
    return data


def make_directory(path: Path) -> None:
    """Create a directory, unless it exists, with the permissions of its parent."""
    with suppress(FileExistsError):
        path.mkdir()
        inherit_permissions(path, path.parent)


def inherit_permissions(made: Path | int, directory: Path) -> None:
    """Give a new path, or its descriptor, the group and the permissions of the directory that contains it.

    Thus all members of the group of a shared directory can change each other's files, whatever their umask.
    """
    like = os.stat(directory)
    is_directory = stat.S_ISDIR(os.stat(made).st_mode)
    mode = like.st_mode & _DIRECTORY_MODE | 0o700 if is_directory else like.st_mode & _FILE_MODE | 0o600
    # only a member of the group may do this
    with suppress(OSError):
        os.chown(made, -1, like.st_gid)
    # not every file system has permissions
    with suppress(OSError):
        os.chmod(made, mode)


def kind_of(mode: int) -> str:
    """Return the kind of file that a mode of `os.stat` stands for, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "a file")


def _not_regular(path: Path, mode: int) -> OSError:
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ELOOP if stat.S_ISLNK(mode) else errno.EINVAL
    return OSError(code, f"is {kind_of(mode)}, expected a regular file", str(path))
