"""What happened to every arrival, one column per fact; the client writes it, the report reads it."""

from array import array
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np

UNKNOWN = -1


class Failure(IntEnum):
    """Why an arrival got no whole answer; a positive outcome is an HTTP status instead."""

    REFUSED = -1  # the connection was never made, nothing was sent
    TIMEOUT = -2
    LOST_REUSED = -3  # closed before the first byte on a connection that had answered: maybe never read
    LOST_FRESH = -4  # closed before the first byte of the answer, on a new connection
    LOST_PARTIAL = -5  # closed, or not HTTP, in the middle of the answer


class Labels:
    """Small integers for header values, so that a column can hold them."""

    def __init__(self) -> None:
        """Start with none known."""
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
    """Columns over all arrivals; times are seconds of `time.monotonic()`, 0 where it did not happen."""

    def __init__(self, offsets: Sequence[float], start: float) -> None:
        """Lay out the columns for arrivals scheduled `offsets` seconds after `start`."""
        self.start = start
        self.intended = array("d", (start + offset for offset in offsets))
        self.fired = array("d", bytes(8 * len(self)))
        self.sent = array("d", bytes(8 * len(self)))
        self.done = array("d", bytes(8 * len(self)))
        self.outcome = array("h", bytes(2 * len(self)))
        self.invalid = array("b", bytes(len(self)))
        self.retry_after = array("b", bytes(len(self)))  # whether the answer had one
        self.version = array("i", [UNKNOWN]) * len(self)
        self.served_by = array("i", [UNKNOWN]) * len(self)
        self.versions, self.servers = Labels(), Labels()
        self.causes: dict[str, int] = {}
        self.opened = self.peak = 0

    def __len__(self) -> int:
        """Count the arrivals."""
        return len(self.intended)

    def save(self, path: Path) -> None:
        """Write every column, and the names of versions and servers, as an .npz file."""
        columns = {name: np.array(value) for name, value in vars(self).items() if isinstance(value, array)}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            allow_pickle=False,
            versions=np.array(self.versions.names, str),
            servers=np.array(self.servers.names, str),
            **columns,
        )

    def blame(self, error: BaseException) -> None:
        """Count the operating system's word for a failed or broken connection."""
        cause = f"{type(error).__name__}: {error}"
        self.causes[cause] = self.causes.get(cause, 0) + 1
