"""The long array of a JSON body: where it lies, and where it may be cut, so that it is read in parts.

If `[A]` and `[B]` are arrays of JSON that are not empty, so is `[A,B]`: a long one is cut at commas between its items,
and each part is read by itself. The rest of the body, `[]` in the place of the array, is read as any short body.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SEARCHED = 2**16  # bytes of a body in which the name of its array must stand
PART = 2**16  # bytes of a part; reading it takes a fraction of a millisecond, or 10 ms to say what is wrong
NUMBER = 64  # bytes of a number with the white space around it, at most
OPENING = re.compile(rb"[\[\s]*")
STRING_END = re.compile(rb'"\s*,')
ITEM_ENDS = [re.compile(rb"," if not depth else rb"\]\s*" * depth + rb",") for depth in range(4)]


@dataclass(frozen=True)
class LongArray:
    """The array in `body[start:end]`, brackets included."""

    body: bytes | bytearray
    start: int
    end: int

    @property
    def text(self) -> bytes:
        """The array itself."""
        return bytes(self.body[self.start : self.end])

    @property
    def rest(self) -> bytes:
        """The body without the array, `[]` in its place."""
        return bytes(self.body[: self.start]) + b"[]" + bytes(self.body[self.end :])

    @property
    def is_most_of_the_body(self) -> bool:
        """Whether it is long, and the rest of the body is not."""
        length = self.end - self.start
        return length > PART and len(self.body) - length <= 4 * PART

    @property
    def is_of_strings(self) -> bool:
        """Whether its first item is a string."""
        return self.body[self.start + 1 : self.start + SEARCHED].lstrip().startswith(b'"')

    @property
    def depth(self) -> int:
        """How deep its first number is nested: 1 if the array is flat."""
        opening = OPENING.match(self.body, self.start, self.start + SEARCHED)
        return opening[0].count(b"[") if opening else 0

    def parts(self, shape: Sequence[int]) -> Iterator[tuple[int, int] | None]:
        """Yield the bounds of its parts of whole items of `shape`; None, as the last one, if an item is too long."""
        pattern = STRING_END if self.is_of_strings else ITEM_ENDS[len(shape)]
        longest = NUMBER * math.prod(shape) + 1024
        at, end = self.start + 1, self.end - 1
        while True:
            cut = pattern.search(self.body, at + PART, min(end, at + PART + longest))
            stop = cut.end() - 1 if cut else end
            if stop - at > PART + longest:
                yield None
                return
            yield at, stop
            if not cut:
                return
            at = stop + 1


def find_array(body: bytes | bytearray, *names: str) -> LongArray | None:
    """Return the array of numbers, or of strings, that is the value of a name; None if none is found.

    The result is right only for valid JSON. If the body is not valid, parsing the array or the rest of it fails.
    """
    name = "|".join(map(re.escape, names)).encode()
    found = re.compile(rb'[{,]\s*"(?:%s)"\s*:\s*\[' % name).search(body, 0, SEARCHED)
    if found is None:
        return None
    array = LongArray(body, found.end() - 1, len(body))
    end = body.find(b"]", array.start) + 1 if array.is_of_strings else _end_of_numbers(array)
    return LongArray(body, array.start, end) if end else None


def _end_of_numbers(array: LongArray) -> int:
    """Return where an array ends: where its brackets close for the last time; 0 if that is not found.

    That is before the next name, if all in the array are numbers; otherwise somewhere before the end of the body.
    """
    quote = array.body.find(b'"', array.start)
    closing = re.compile(rb"(?s).*[^\s,:\[\]{}](?:\s*\]){%d}(?!\s*\])" % array.depth)
    for end in (quote if quote > 0 else len(array.body), len(array.body)):
        found = closing.match(array.body, max(array.start, end - SEARCHED), end)
        if found:
            return found.end()
    return 0
