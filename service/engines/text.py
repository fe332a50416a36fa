"""The encoder engine: one encoder with its batcher. Texts in; chunks, and the vectors that nets read, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np

from lvm.errors import Invalid, NoEncoder, Overloaded
from models.text.chunks import Count, chunking
from models.text.encoder import MAX_WORD_PIECES, EncoderError, TextInfo
from models.vectors import Floats
from service.engines.batcher import Batch, MicroBatcher
from service.settings import Settings
from service.telemetry.metrics import Metrics

BATCH = 16  # texts, some 30 ms of a core each: whoever comes next waits for all of them
QUEUE = 128  # rows of one client, a few seconds' work: who waits longer than that has given up
CHARACTERS = 1000  # of text that cost as much as a row
SLICE_S = 0.01  # of cutting one text, after which others get their turn


class EncoderLike(Protocol):
    """What the engine runs: an encoder of `models.text.encoder`, or a fake of it."""

    @property
    def name(self) -> str:
        """Name of the model."""
        ...

    def count_tokens(self, text: str) -> int:
        """Return the number of word-pieces in `text`, nothing cut off."""
        ...

    def text_info(self, text: str) -> TextInfo:
        """Return how much of `text` is read."""
        ...

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return unit vectors `(N, D)`, one a text in order; raises `EncoderError`."""
        ...


class Said(NamedTuple):
    """A context of `length` chunks in words: the chunks, or a passage whose last ones it is; or else a query."""

    words: list[str] | str
    length: int
    may_be_query: bool = False
    client: str = ""

    @property
    def cost(self) -> int:
        """What it costs to read, in rows: its chunks, and the characters that they are cut of."""
        return self.length + weight(self.words)


class Cut(NamedTuple):
    """How words are to be read: as a `context` of chunks, or a `query` of one; and how much of each chunk is."""

    read_as: str
    chunks: list[str]
    infos: list[TextInfo]


class Read(NamedTuple):
    """How words were read, and the vectors `(n, D)` of their chunks."""

    read_as: str
    chunks: list[str]
    infos: list[TextInfo]
    vectors: Floats


class Reading:
    """Words that are being read: a long text is cut in slices, so that others are read meanwhile."""

    def __init__(self, said: Said) -> None:
        self.said = said
        self._cutting: Generator[None, None, list[str]] | None = None

    def chunks(self, text: str, count: Count) -> list[str] | None:
        """Return the chunks of `text`, or None if it takes longer than a slice: then call it again."""
        cutting, self._cutting = self._cutting or chunking(text, count), None
        until = perf_counter() + SLICE_S
        while perf_counter() < until:
            try:
                next(cutting)
            except StopIteration as end:
                chunks: list[str] = end.value
                return chunks
        self._cutting = cutting
        return None


class EncoderEngine:
    """Serves one encoder; one batch runs at a time, in a thread of its own."""

    alias = "encoder"

    def __init__(self, encoder: EncoderLike, settings: Settings, metrics: Metrics) -> None:
        self._encoder, self._metrics = encoder, metrics
        self.name = Path(encoder.name).name  # where a directory lies is nobody else's business
        self._rows = metrics.batch_rows.labels(self.alias)
        self._max_queue, self._waiting = min(QUEUE, settings.max_queue), Counter[str]()
        self.batcher: MicroBatcher[Reading, Read | None] = MicroBatcher(
            self._run,
            name=self.alias,
            max_rows=BATCH,
            max_queue=settings.max_queue,
            client_of=lambda reading: reading.said.client,
            on_batch=self._observe,
            laps=lambda _, seconds: (("embed", seconds),),
        )

    async def read(self, said: Said, deadline: float) -> Read:
        """Return what `said` is in vectors.

        Raises:
            Invalid: not as many chunks as a context has, a passage of fewer that is no query either, or a text that
                the encoder cannot read.
            NoEncoder: the encoder cannot be opened.
            Overloaded, Draining, Expired, ModelFailed: as `MicroBatcher.submit`.
        """
        if isinstance(said.words, list) and len(said.words) != said.length:
            raise Invalid(f"want {said.length} chunks, oldest first, not {len(said.words)}", pointer="/texts")
        if self._waiting[said.client] + said.cost > self._max_queue and self._waiting[said.client]:
            raise Overloaded(f"{self._waiting[said.client]} rows are waiting", retry_after=self.batcher.backlog_s())
        self._waiting[said.client] += said.cost
        try:
            return await self._read(Reading(said), min(said.cost, BATCH), deadline)
        finally:
            self._waiting[said.client] -= said.cost
            if not self._waiting[said.client]:
                del self._waiting[said.client]

    async def _read(self, reading: Reading, rows: int, deadline: float) -> Read:
        while True:
            (ticket,) = await self.batcher.submit([(reading, rows)], deadline)
            if ticket.answer is not None:
                return ticket.answer

    def _run(self, items: list[Reading]) -> Sequence[Read | Exception | None]:
        try:
            cut = [self._cut(reading) for reading in items]
            if not any(cut):
                return [None] * len(items)
            chunks = [chunk for each in cut if isinstance(each, Cut) for chunk in each.chunks]
            vectors = self._encoder.encode(chunks)
        except EncoderError as error:
            return [NoEncoder(str(error))] * len(items)
        if not np.isfinite(vectors).all():
            raise ValueError("a vector is not finite")
        return _dealt(cut, vectors)

    def _cut(self, reading: Reading) -> Cut | Invalid | None:
        """Return how the words are to be read, and the chunks that count; None if they are to be cut further."""
        said = reading.said
        if isinstance(said.words, list):
            return self._readable("context", said.words, [f"/texts/{at}" for at in range(said.length)])
        chunks = reading.chunks(said.words, self._encoder.count_tokens)
        if chunks is None:
            return None
        if len(chunks) >= said.length:
            return self._readable("context", chunks[-said.length :], ["/text"] * said.length)
        as_query = self._readable("query", [said.words], ["/text"])
        if isinstance(as_query, Invalid):
            return as_query
        if said.may_be_query and as_query.infos[0].word_pieces <= MAX_WORD_PIECES - 2:
            return as_query
        return _too_short(said, len(chunks))

    def _readable(self, read_as: str, chunks: list[str], pointers: Sequence[str]) -> Cut | Invalid:
        """Return chunks and how much of each is read, or the fault of the first that cannot be."""
        infos = [self._encoder.text_info(text) for text in chunks]
        for at, (info, pointer) in enumerate(zip(infos, pointers, strict=True)):
            if info.fault:
                which = f"chunk {at + 1} of the last {len(chunks)}: " if pointers.count(pointer) > 1 else ""
                return Invalid(f"{which}{info.fault}", pointer=pointer)
        return Cut(read_as, chunks, infos)

    def _observe(self, batch: Batch) -> None:
        self._rows.observe(batch.rows)
        self._metrics.batch_released.inc(self.alias, batch.reason)


def weight(words: list[str] | str) -> int:
    """Return the rows that the characters of a text cost, beside those of its chunks; 0 for a short one."""
    return (len(words) if isinstance(words, str) else sum(map(len, words))) // CHARACTERS


def _dealt(cut: list[Cut | Invalid | None], vectors: Floats) -> list[Read | Exception | None]:
    """Return what each item was read as, its share of `vectors` `(n, D)` with it."""
    answers: list[Read | Exception | None] = []
    for each in cut:
        if not isinstance(each, Cut):
            answers.append(each)
        else:
            answers.append(Read(*each, vectors[: len(each.chunks)]))
            vectors = vectors[len(each.chunks) :]
    return answers


def _too_short(said: Said, count: int) -> Invalid:
    query = f", and more than the {MAX_WORD_PIECES - 2} word-pieces of a query" if said.may_be_query else ""
    return Invalid(
        f"the text makes {count} chunks, a context has {said.length}{query}: a chunk is some 50 to 100 word-pieces, "
        "ending where a sentence or a paragraph ends",
        pointer="/text",
    )
