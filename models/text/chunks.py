"""Text to chunks, the passages of a corpus and the units of a context; the same code in training and in serving."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise

Count = Callable[[str], int]


@dataclass(frozen=True)
class Sizes:
    """Chunk sizes in word-pieces.

    No chunk is smaller than `least` or larger than `most`. From `close` on, the end of a paragraph ends the chunk.
    Sentences are packed up to `full`.
    """

    least: int = 30
    close: int = 50
    full: int = 100
    most: int = 140


STANDARD = Sizes()


# Stops of other scripts. No space need follow.
_OWN = "。｡！？।॥؟۔։።፧።។៕။།༎"
_CLOSING = "\"'\u201d\u2019»)\\]」』）】》〉"
# Each starts only at the first of a run of stops. Otherwise a line of dots costs the square of its length.
_SPACED_STOP = r"(?<![.!?…])[.!?…]+[\"'\u201d\u2019»)\]]*\s+(?=\S)"
_OWN_STOP = rf"(?<![{_OWN}．])(?:[{_OWN}]|．(?!\d))++[{_CLOSING}]*+\s*+(?=\S)"
_STOP = re.compile(f"{_SPACED_STOP}|{_OWN_STOP}")
_OPENING = "\"'\u201c\u2018«(["
_JOINER = "\u200d"
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
# the most code points that count as one visible character
_CLUSTER = 32
_ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)*[^\W\d_]"  # initials, U.S, e.g
    r"|Mrs?|Ms|Dr|Prof|St|Gen|Col|Lt|Sgt|Capt|Maj|Adm|Rev|Hon|Gov|Sen|Rep|Pres|Mt|Ft|Nos?|Vol|Figs?|Eq"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|vs|cf|ca|approx|al|pp|vol|fig|eq|viz|eds?"
)


def chunk(text: str, count: Count, sizes: Sizes = STANDARD) -> list[str]:
    """Cut `text` into chunks of `sizes.least` to `sizes.most` word-pieces, every word in order.

    Sentences are packed while the chunk stays within `full`. The end of a paragraph (a blank line) ends a chunk of
    `close` or more. A chunk below `least` takes the next sentence even beyond `full`. A sentence that is too long for
    that is halved between words; a single word that is too long is cut between characters. A remainder below `least`
    joins the last chunk, or is dropped if that would exceed `most`.
    Each sentence is counted once: adjacent sentences have as many word-pieces as separate ones.
    """
    cutting = chunking(text, count, sizes)
    while True:
        try:
            next(cutting)
        except StopIteration as end:
            chunks: list[str] = end.value
            return chunks


def chunking(text: str, count: Count, sizes: Sizes = STANDARD) -> Generator[None, None, list[str]]:
    """Return the chunks of `text`; yield after every few calls of `count`, so that long texts can be cut in slices."""
    packer = _Packer(count, sizes)
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in sentences(paragraph):
            parts = packer.add(sentence)
            yield
            while parts:
                parts = [*packer.add(*parts[0]), *parts[1:]]
                yield
        packer.end_paragraph()
    return packer.finish()


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of `paragraph`, each with its trailing space; runs of whitespace become one space.

    A stop ends a sentence unless a lower-case letter follows, or initials or a common abbreviation precede.
    """
    text = " ".join(paragraph.split())
    ends = [stop.end() for stop in _STOP.finditer(text) if _ends_sentence(text, stop)]
    return [text[start:end] for start, end in pairwise([0, *ends, len(text)]) if end > start]


def _ends_sentence(text: str, stop: re.Match[str]) -> bool:
    following = text[stop.end() : stop.end() + 3].lstrip(_OPENING)
    if following[:1].islower():
        return False
    word = text[text.rfind(" ", 0, stop.start()) + 1 : stop.start()].lstrip(_OPENING)
    return stop[0].strip() != "." or not _ABBREVIATION.fullmatch(word)


class _Packer:
    """Fills one chunk at a time: `open` with `size` word-pieces; `chunks` are complete, the last with `closed`."""

    def __init__(self, count: Count, sizes: Sizes) -> None:
        self.count = count
        self.sizes = sizes
        self.chunks: list[str] = []
        self.open = ""
        self.size = 0
        self.closed = 0

    def add(self, text: str, size: int | None = None) -> list[tuple[str, int | None]]:
        """Add text to the open chunk; if it is too long for one chunk, return the parts to add instead."""
        size = self.count(text) if size is None else size
        if self.size + size > self.sizes.full and self.size >= self.sizes.least:
            self._close()
        if self.size + size > self.sizes.most and len(text) > _CLUSTER:
            return self._parts(text, size)
        self.open = self.open + text
        self.size = self.size + size
        if self.size > self.sizes.full:
            self._close()
        return []

    def end_paragraph(self) -> None:
        if self.size >= self.sizes.close:
            self._close()
        self.open = f"{self.open} ".lstrip()

    def finish(self) -> list[str]:
        if self.size >= self.sizes.least:
            self._close()
        elif self.size and self.chunks and self.closed + self.size <= self.sizes.most:
            self.chunks[-1] = f"{self.chunks[-1]} {self.open}".strip()
        return self.chunks

    def _close(self) -> None:
        self.chunks.append(self.open.strip())
        self.open, self.size, self.closed = "", 0, self.size

    def _parts(self, sentence: str, size: int) -> list[tuple[str, int | None]]:
        """Split a sentence in half between words, or a single word into parts of about `full` word-pieces."""
        words = sentence.split()
        if len(words) > 1:
            middle = len(" ".join(words[: len(words) // 2])) + 1
            half = self.count(sentence[:middle])
            return [(sentence[:middle], half), (sentence[middle:], size - half)]
        parts = max(2, -(-size // self.sizes.full))
        cuts = [_between_characters(sentence, len(sentence) * part // parts) for part in range(1, parts)]
        return [(sentence[start:end], None) for start, end in pairwise([0, *cuts, len(sentence)]) if end > start]


def _between_characters(text: str, at: int) -> int:
    """Return the first offset from `at` on between two visible characters, so that no accent is cut off."""
    near = range(at, min(at + _CLUSTER, len(text)))
    default = at if at + _CLUSTER < len(text) else len(text)
    return next((offset for offset in near if not _is_inside(text, offset)), default)


def _is_inside(text: str, at: int) -> bool:
    after = text[at]
    return _JOINER in text[at - 1 : at + 1] or unicodedata.category(after)[0] == "M" or after in _SKIN_TONES
