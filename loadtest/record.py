"""What happens to every request, one column per fact: the client writes it, `samples` reads it."""

from array import array
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

UNKNOWN = -1
# The type code and the initial value of every column.
_COLUMNS: dict[str, tuple[str, int]] = {
    "intended": ("d", 0),
    "fired": ("d", 0),
    "sent": ("d", 0),
    "done": ("d", 0),
    "outcome": ("h", 0),
    "invalid": ("b", 0),
    "retry_after": ("b", 0),
    "version": ("i", UNKNOWN),
    "served_by": ("i", UNKNOWN),
}


class Failure(IntEnum):
    """Why a request got no whole response; a positive outcome is an HTTP status instead."""

    # The connection was never made, nothing was sent.
    REFUSED = -1
    TIMEOUT = -2
    # Closed before the first byte, on a connection that had been used before: the server may not have read the request.
    LOST_REUSED = -3
    # Closed before the first byte, on a new connection.
    LOST_FRESH = -4
    # Closed, or not HTTP, in the middle of the response.
    LOST_PARTIAL = -5


class Labels:
    """Small integers for header values, so that a column can hold them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: dict[bytes, int] = {}

    def code(self, value: bytes | None) -> int:
        """Return the code of a header value, UNKNOWN if the header was absent."""
        if value is None:
            return UNKNOWN
        if value not in self._codes:
            self._codes[value] = len(self.names)
            self.names.append(value.decode("latin-1"))
        return self._codes[value]


class Record:
    """Columns over requests; times are seconds of `time.monotonic()`, 0 if it did not happen."""

    intended: "array[float]"
    fired: "array[float]"
    sent: "array[float]"
    done: "array[float]"
    outcome: "array[int]"
    invalid: "array[int]"
    retry_after: "array[int]"
    version: "array[int]"
    served_by: "array[int]"

    def __init__(self, start: float, offsets: Iterable[float] = ()) -> None:
        """Lay out the columns for requests intended `offsets` seconds after `start`."""
        self.start = start
        intended = array("d", (start + offset for offset in offsets))
        for name, (kind, initial) in _COLUMNS.items():
            setattr(self, name, array(kind, [initial]) * len(intended))
        self.intended = intended
        self._appends = [(getattr(self, name).append, initial) for name, (_, initial) in _COLUMNS.items()]
        self.versions = Labels()
        self.servers = Labels()
        self.causes: dict[str, int] = {}
        self.opened = 0
        self.peak = 0
        self.checked = 0
        self.difference = 0.0

    def __len__(self) -> int:
        """Count the requests."""
        return len(self.intended)

    def add(self, intended: float) -> int:
        """Append a request and return its index."""
        for append, initial in self._appends:
            append(initial)
        self.intended[-1] = intended
        return len(self.intended) - 1

    def blame(self, error: BaseException) -> None:
        """Count the operating system's error for a failed or broken connection."""
        cause = f"{type(error).__name__}: {error}"
        self.causes[cause] = self.causes.get(cause, 0) + 1

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return every column as an array, and the names of versions and servers by code."""
        names = {"versions": np.array(self.versions.names, str), "servers": np.array(self.servers.names, str)}
        return {name: np.array(getattr(self, name)) for name in _COLUMNS} | names

    def save(self, path: Path) -> None:
        """Write the columns as an .npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, allow_pickle=False, **self.columns())
