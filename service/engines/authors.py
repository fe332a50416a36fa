"""Authors: who gave the answers that are scored, by numbers that are the same in every process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

# Versions of an alias that have scores of their own in one process; further ones share a label.
MAX_VERSIONS = 16
OTHER = "other"


class Author(NamedTuple):
    """What answers: an alias, and the version that it serves."""

    alias: str
    model: str
    version: str


class Authors:
    """Numbers authors. `current` returns those that answer now in any process that shares the memory of answers."""

    def __init__(self, current: Callable[[], Iterable[Author]] = tuple) -> None:
        self._current = current
        self._known: dict[int, Author] = {}
        self._versions: defaultdict[str, set[Author]] = defaultdict(set)

    def identify(self, author: Author) -> int:
        """Return the number of an author; remember its name."""
        number = xxh3_64_intdigest("\0".join(author).encode())
        if number not in self._known:
            versions = self._versions[author.alias]
            versions.add(author if len(versions) < MAX_VERSIONS else Author(author.alias, OTHER, OTHER))
            self._known[number] = author if author in versions else Author(author.alias, OTHER, OTHER)
        return number

    def find(self, number: int) -> Author | None:
        """Return the author with a number; None if this process does not know it."""
        if number not in self._known:
            for author in self._current():
                self.identify(author)
        return self._known.get(number)
