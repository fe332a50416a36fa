"""Members of JSON objects in responses, read by the type that they must have."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np

from lvm.client.failures import BadAnswer
from lvm.client.requests import Floats

# the largest integer that JSON carries exactly
MAX_INTEGER = 2**53
KINDS: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    NoneType: "null",
}


@dataclass(frozen=True)
class Members:
    """The members of an object, which stands at `place` in a response.

    Every method raises `BadAnswer` if a member is missing, is of another type, or is a number that is not finite or
    out of range. `optional_` methods return None for one that is missing or null.
    """

    found: Mapping[str, Any]
    place: str = ""

    @classmethod
    def of_body(cls, body: bytes) -> Members:
        """Return the members of the object that a body is."""
        try:
            found = json.loads(body, parse_constant=_reject)
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"response is not JSON: {type(error).__name__}: {error}") from error
        if not isinstance(found, dict):
            raise BadAnswer(f"response is {KINDS[type(found)]}; expected an object")
        return cls(found)

    def has(self, name: str) -> bool:
        """Return whether a member is there, and not null."""
        return self.found.get(name) is not None

    def text(self, name: str) -> str:
        """Return a string."""
        value: str = self._value(name, str)
        return value

    def text_or_null(self, name: str) -> str | None:
        """Return a string, or None if it is null."""
        value: str | None = self._value(name, str, NoneType)
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a string or None."""
        return self.text(name) if self.has(name) else None

    def flag(self, name: str) -> bool:
        """Return a boolean."""
        value: bool = self._value(name, bool)
        return value

    def count(self, name: str) -> int:
        """Return an integer of at least 0."""
        value: int = self._value(name, int)
        if not 0 <= value <= MAX_INTEGER:
            raise self._bad(name, "is out of range")
        return value

    def number(self, name: str) -> float:
        """Return a number."""
        value: float = self._value(name, float, int)
        if not abs(value) <= MAX_INTEGER:
            raise self._bad(name, "is not finite or out of range")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Return a number or None."""
        return self.number(name) if self.has(name) else None

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        return [items.text(at) for items, at in self._items(name)]

    def flags(self, name: str) -> list[bool]:
        """Return a list of booleans."""
        return [items.flag(at) for items, at in self._items(name)]

    def numbers(self, name: str) -> list[float]:
        """Return a list of numbers."""
        return [items.number(at) for items, at in self._items(name)]

    def object(self, name: str) -> Members:
        """Return an object."""
        return Members(self._value(name, dict), f"{self.place}/{name}")

    def objects(self, name: str) -> list[Members]:
        """Return a list of objects."""
        return [items.object(at) for items, at in self._items(name)]

    def optional_objects(self, name: str) -> list[Members]:
        """Return a list of objects, empty if it is missing."""
        return self.objects(name) if self.has(name) else []

    def lists_of_objects(self, name: str) -> list[list[Members]]:
        """Return a list of lists of objects."""
        return [items.objects(at) for items, at in self._items(name)]

    def optional_scalars(self, name: str) -> dict[str, str | float | bool | None] | None:
        """Return an object of strings, numbers, booleans and nulls, or None."""
        if not self.has(name):
            return None
        members = self.object(name)
        return {each: members._scalar(each) for each in members.found}

    def vector(self, name: str, dim: int | None = None) -> Floats:
        """Return the vector `(D,)` whose little-endian float32 bytes a string holds as base64."""
        try:
            content = base64.b64decode(self.text(name), validate=True)
        except ValueError as error:
            raise self._bad(name, f"is not base64: {error}") from error
        expected = 4 * dim if dim else max(4, len(content) // 4 * 4)
        if len(content) != expected:
            raise self._bad(name, f"has {len(content)} bytes; expected {expected}")
        vector: Floats = np.frombuffer(content, "<f4").astype(np.float32)
        if not np.isfinite(vector).all():
            raise self._bad(name, "has values that are not finite")
        return vector

    def vectors(self, name: str, dim: int, count: int) -> Floats:
        """Return the vectors `(count, dim)` of a list of base64."""
        items = list(self._items(name))
        if len(items) != count or not count or not dim:
            raise self._bad(name, f"has {len(items)} vectors of {dim} dimensions; expected {count}")
        return np.stack([each.vector(at, dim) for each, at in items])

    def _items(self, name: str) -> Iterator[tuple[Members, str]]:
        """Yield the items of a list, as members whose names are their places."""
        items = self._value(name, list)
        members = Members({str(at): item for at, item in enumerate(items)}, f"{self.place}/{name}")
        return ((members, at) for at in members.found)

    def _scalar(self, name: str) -> str | float | bool | None:
        value: str | float | bool | None = self._value(name, str, float, int, bool, NoneType)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._bad(name, "is not finite")
        return value

    def _value(self, name: str, *types: type) -> Any:
        if name not in self.found:
            raise self._bad(name, "is missing")
        value = self.found[name]
        if type(value) not in types:
            raise self._bad(name, f"is {KINDS[type(value)]}; expected {KINDS[types[0]]}")
        return value

    def _bad(self, name: str, what: str) -> BadAnswer:
        return BadAnswer(f"response: {self.place[:200]}/{name[:200]} {what}")


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")
