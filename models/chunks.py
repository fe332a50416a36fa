"""Text to chunks: what a corpus holds, and what a net reads the vectors of; the same in training and in serving."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

Count = Callable[[str], int]


@dataclass(frozen=True)
class Sizes:
    """Chunk sizes in word-pieces."""

    least: int = 30  # no chunk is smaller
    close: int = 50  # from here on the end of a paragraph ends the chunk
    full: int = 100  # sentences are packed up to this
    most: int = 140  # no chunk is larger


STANDARD = Sizes()


# Starts only at the first of a run of stops: else a line of dots costs the square of its length.
_STOP = re.compile(r"(?<![.!?…])[.!?…]+[\"'\u201d\u2019»)\]]*\s+(?=\S)")
_OPENING = "\"'\u201c\u2018«(["
_ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)*[^\W\d_]"  # initials, U.S, e.g
    r"|Mrs?|Ms|Dr|Prof|St|Gen|Col|Lt|Sgt|Capt|Maj|Adm|Rev|Hon|Gov|Sen|Rep|Pres|Mt|Ft|Nos?|Vol|Figs?|Eq"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|vs|cf|ca|approx|al|pp|vol|fig|eq|viz|eds?"
)


def chunk(text: str, count: Count, sizes: Sizes = STANDARD) -> list[str]:
    """Cut `text` into chunks of `sizes.least` to `sizes.most` word-pieces, every word in order.

    Sentences are packed while the chunk stays within `full`; the end of a paragraph (a blank line) ends
    a chunk of `close` or more. A chunk below `least` takes the next sentence even beyond `full`; a
    sentence too long for that is halved between words, a single word too long between characters.
    What is left at the end below `least` joins the last chunk, or is dropped where that exceeds `most`.
    """
    packer = _Packer(count, sizes)
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in sentences(paragraph):
            packer.add(sentence)
        packer.end_paragraph()
    return packer.finish()


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of `paragraph`, whitespace runs made one blank.

    A stop ends a sentence unless a small letter follows, or initials or a common abbreviation precede.
    """
    text = " ".join(paragraph.split())
    ends = [stop.end() for stop in _STOP.finditer(text) if _ends_sentence(text, stop)]
    return [text[start:end].rstrip() for start, end in pairwise([0, *ends, len(text)]) if end > start]


def _ends_sentence(text: str, stop: re.Match[str]) -> bool:
    following = text[stop.end() : stop.end() + 3].lstrip(_OPENING)
    if following[:1].islower():
        return False
    word = text[text.rfind(" ", 0, stop.start()) + 1 : stop.start()].lstrip(_OPENING)
    return stop[0].strip() != "." or not _ABBREVIATION.fullmatch(word)


class _Packer:
    """Fills one chunk at a time; `chunks` are closed, `open` of `size` word-pieces is not."""

    def __init__(self, count: Count, sizes: Sizes) -> None:
        self.count, self.sizes = count, sizes
        self.chunks: list[str] = []
        self.open, self.size = "", 0

    def add(self, sentence: str) -> None:
        joined = f"{self.open} {sentence}".strip()
        size = self.count(joined)
        if size <= self.sizes.full:
            self.open, self.size = joined, size
        elif self.size >= self.sizes.least:
            self._close(self.open)
            self.add(sentence)
        elif size <= self.sizes.most:
            self._close(joined)
        else:
            for half in _halves(sentence):
                self.add(half)

    def end_paragraph(self) -> None:
        if self.size >= self.sizes.close:
            self._close(self.open)

    def finish(self) -> list[str]:
        if self.size >= self.sizes.least:
            self._close(self.open)
        elif self.open and self.chunks:
            joined = f"{self.chunks[-1]} {self.open}"
            if self.count(joined) <= self.sizes.most:
                self.chunks[-1] = joined
        return self.chunks

    def _close(self, text: str) -> None:
        self.chunks.append(text)
        self.open, self.size = "", 0


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    if len(words) == 1:
        middle = len(sentence) // 2
        return sentence[:middle], sentence[middle:]
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])
