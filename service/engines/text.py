"""Text: the adapter by which an engine runs an encoder. Texts in; chunks, and the vectors that nets read, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from lvm.errors import Invalid, NoEncoder, Overloaded
from models.text.chunks import Count, chunking
from models.text.encoder import MAX_WORD_PIECES, Encoder, EncoderError, TextInfo
from models.vectors import Floats
from service.engines.batcher import BatchLimits, MicroBatcher
from service.engines.engine import Engine, EngineInfo, Stages
from service.settings import Settings
from service.telemetry.metrics import Metrics

ENCODER = "encoder"  # the name of the engine in metrics
MAX_BATCH = 16  # texts, some 30 ms of a core each: the next request waits for all of them
MAX_ROWS_OF_CLIENT = 128  # rows of one client that may wait: a few seconds of work
CHARACTERS_PER_ROW = 1000  # of text that cost as much as a row
CHARACTERS_PER_CHUNK = 400  # of a passage, about
LEAST_CHUNKS = 2  # of a context
SLICE_S = 0.01  # of cutting one text, after which other texts get their turn


class TextInput(NamedTuple):
    """A context as text: at most `length` chunks, or a passage whose last chunks it is; or a query, if `may_be_query`.

    A context of fewer than `length` chunks, but of `LEAST_CHUNKS`, is a partial one.
    """

    text: list[str] | str
    length: int
    may_be_query: bool = False
    client: str = ""

    @property
    def rows(self) -> int:
        """What it costs to encode, in rows: its chunks, and the characters that they are cut from."""
        return self.length + character_cost_rows(self.text)


class EmbedInput(NamedTuple):
    """Texts, each of which gets a vector; or a passage, each chunk of which gets one.

    `pointers` are to the texts in the request: as many as there are texts, or one to the passage.
    """

    text: list[str] | str
    pointers: list[str]
    client: str = ""

    @property
    def rows(self) -> int:
        """What it costs to encode, in rows: its texts, or about as many as it has chunks, and the characters."""
        count = len(self.text) if isinstance(self.text, list) else 1 + len(self.text) // CHARACTERS_PER_CHUNK
        return count + character_cost_rows(self.text)


class Encoded(NamedTuple):
    """What is read of a text, as a `context`, a `partial_context` or a `query`, and how much of each chunk is read.

    `vectors` `(n, D)` are those of the chunks; there are none before the encoder has run. An `EmbedInput` is read as
    `texts`; `queue_s` and `embed_s` are the seconds in which it waited and in which its batches ran.
    """

    read_as: str
    chunks: list[str]
    infos: list[TextInfo]
    vectors: Floats = np.zeros((0, 0), np.float32)
    queue_s: float = 0.0
    embed_s: float = 0.0


class Place(NamedTuple):
    """Where a text stands: the JSON pointer, and what an error says before its reason."""

    pointer: str
    prefix: str = ""


class EmbedPart(NamedTuple):
    """Texts of an `EmbedInput` that run together, in the time of at most `MAX_BATCH` short ones."""

    texts: list[str]
    places: list[Place]
    client: str


class IncrementalChunker:
    """A text on its way: a long one is cut in slices, so that other texts run meanwhile."""

    def __init__(self, request: TextInput | EmbedInput) -> None:
        self.request = request
        self.client = request.client
        self._cutting: Generator[None, None, list[str]] | None = None

    def chunks(self, text: str, count: Count) -> list[str] | None:
        """Return the chunks of `text`, or None if that takes longer than a slice: then call it again."""
        cutting = self._cutting or chunking(text, count)
        self._cutting = None
        until = perf_counter() + SLICE_S
        while perf_counter() < until:
            try:
                next(cutting)
            except StopIteration as end:
                chunks: list[str] = end.value
                return chunks
        self._cutting = cutting
        return None


Item = IncrementalChunker | EmbedPart
Result = Encoded | list[str] | None  # None: the cutting is not finished; a list: the chunks of an `EmbedInput`
Batcher = MicroBatcher[Item, Result]


class TextAdapter:
    """Runs one encoder; each client may have `max_rows_of_client` rows waiting."""

    reference = None

    def __init__(self, encoder: Encoder, max_rows_of_client: int) -> None:
        name = Path(encoder.name).name  # the directory that a model lies in is not for callers
        self.info = EngineInfo(ENCODER, name, "", "", type(encoder).__name__, (1, encoder.dim), name)
        self._encoder = encoder
        self._max_rows_of_client = max_rows_of_client
        self._waiting = Counter[str]()  # rows by client

    async def answer(self, request: TextInput | EmbedInput, deadline: float, batcher: Batcher) -> Encoded:
        """Return the vectors of a text, or of many.

        Raises:
            Invalid: a context has more chunks than expected, or too few, and is no query either; or the encoder cannot
                read a text.
            NoEncoder: the encoder cannot be opened.
            Overloaded: too many rows of its client wait.
        """
        if isinstance(request, TextInput):
            _check_count(request)
        with self._share_of_queue(request, batcher):
            if isinstance(request, EmbedInput):
                return await self._embed(request, deadline, batcher)
            read, _ = await self._cut(request, deadline, batcher)
        assert isinstance(read, Encoded)
        return read

    async def _embed(self, request: EmbedInput, deadline: float, batcher: Batcher) -> Encoded:
        """Return the vector of each text, which run in parts, so that other texts run meanwhile."""
        began = perf_counter()
        texts, places, cut_s = request.text, list(map(Place, request.pointers)), 0.0
        if isinstance(texts, str):
            chunks, cut_s = await self._cut(request, deadline, batcher)
            assert isinstance(chunks, list)
            texts = chunks
            places = [Place(request.pointers[0], f"chunk {at} of {len(texts)}: ") for at in range(1, len(texts) + 1)]
        tickets = await batcher.submit(_parts(texts, places, request.client), deadline)
        read = [ticket.answer for ticket in tickets if isinstance(ticket.answer, Encoded)]
        embed_s = cut_s + sum(ticket.run_s for ticket in tickets)
        queue_s = max(0.0, perf_counter() - began - embed_s)
        infos = [info for part in read for info in part.infos]
        return Encoded("texts", texts, infos, np.concatenate([part.vectors for part in read]), queue_s, embed_s)

    async def _cut(
        self, request: TextInput | EmbedInput, deadline: float, batcher: Batcher
    ) -> tuple[Encoded | list[str], float]:
        """Return what comes of a text when it is cut, and the seconds that its batches ran."""
        pending, seconds = IncrementalChunker(request), 0.0
        while True:
            (ticket,) = await batcher.submit([(pending, min(request.rows, MAX_BATCH))], deadline)
            seconds += ticket.run_s
            if ticket.answer is not None:
                return ticket.answer, seconds

    def run(self, items: list[Item], watch: Callable[[Floats], None]) -> Sequence[Result | Exception]:
        """Return each text encoded, or its fault; None if its cutting is not finished."""
        try:
            chunked = [self._chunked(item) for item in items]
            chunks = [chunk for each in chunked if isinstance(each, Encoded) for chunk in each.chunks]
            if not chunks:
                return chunked
            vectors = self._encoder.encode(chunks)
        except EncoderError as error:
            return [NoEncoder(str(error))] * len(items)
        if not np.isfinite(vectors).all():
            raise ValueError("a vector is not finite")
        return _with_vectors(chunked, vectors)

    def stages(self, result: Result, seconds: float) -> Stages:
        """Return the one stage of a batch."""
        return (("embed", seconds),)

    @contextmanager
    def _share_of_queue(self, request: TextInput | EmbedInput, batcher: Batcher) -> Iterator[None]:
        """Count the rows of a text as its client's; raises `Overloaded` if the client has too many."""
        client, waiting = request.client, self._waiting[request.client]
        if waiting and waiting + request.rows > self._max_rows_of_client:
            raise Overloaded(f"{waiting} rows are waiting", retry_after=batcher.retry_after_s())
        self._waiting[client] += request.rows
        try:
            yield
        finally:
            self._waiting[client] -= request.rows
            if not self._waiting[client]:
                del self._waiting[client]

    def _chunked(self, item: Item) -> Encoded | Invalid | list[str] | None:
        """Return what is read of a text, or its fault; None if its cutting is not finished."""
        if isinstance(item, EmbedPart):
            return self._readable("texts", item.texts, item.places)
        request = item.request
        if isinstance(request.text, list):
            assert isinstance(request, TextInput)
            places = [Place(f"/texts/{at}") for at in range(len(request.text))]
            return self._readable(_kind_of_context(request, request.text), request.text, places)
        chunks = item.chunks(request.text, self._encoder.count_tokens)
        if chunks is None:
            return None
        if isinstance(request, EmbedInput):
            return chunks or [request.text]
        return self._context_or_query(request, request.text, chunks)

    def _context_or_query(self, request: TextInput, text: str, chunks: list[str]) -> Encoded | Invalid:
        if len(chunks) < request.length:
            as_query = self._readable("query", [text], [Place("/text")])
            if isinstance(as_query, Invalid):
                return as_query
            if request.may_be_query and as_query.infos[0].word_pieces <= MAX_WORD_PIECES - 2:
                return as_query
        if len(chunks) < min(LEAST_CHUNKS, request.length):
            return _too_short(request, len(chunks))
        last = chunks[-request.length :]
        places = [Place("/text", f"chunk {at} of the last {len(last)}: ") for at in range(1, len(last) + 1)]
        return self._readable(_kind_of_context(request, last), last, places)

    def _readable(self, read_as: str, chunks: list[str], places: Sequence[Place]) -> Encoded | Invalid:
        """Return chunks and how much of each is read, or the fault of the first that cannot be read."""
        infos = [self._encoder.text_info(text) for text in chunks]
        for info, place in zip(infos, places, strict=True):
            if info.fault:
                return Invalid(f"{place.prefix}{info.fault}", pointer=place.pointer)
        return Encoded(read_as, chunks, infos)


def make_text_engine(encoder: Encoder, settings: Settings, metrics: Metrics) -> Engine[TextAdapter]:
    """Return the engine that runs `encoder`."""
    model = TextAdapter(encoder, min(MAX_ROWS_OF_CLIENT, settings.max_queue))
    limits = BatchLimits(MAX_BATCH, settings.max_queue)
    return Engine(model, limits, metrics, client_of=attrgetter("client"))


def character_cost_rows(text: list[str] | str) -> int:
    """Return the rows that the characters of a text cost, besides those of its chunks; 0 for a short one."""
    return (len(text) if isinstance(text, str) else sum(map(len, text))) // CHARACTERS_PER_ROW


def _parts(texts: list[str], places: list[Place], client: str) -> list[tuple[EmbedPart, int]]:
    """Return texts in the parts in which they run, with the rows that each costs."""
    starts, costs = [0], [0]
    for at, text in enumerate(texts):
        cost = min(1 + character_cost_rows(text), MAX_BATCH)
        if costs[-1] + cost > MAX_BATCH:
            starts.append(at)
            costs.append(0)
        costs[-1] += cost
    bounds = pairwise([*starts, len(texts)])
    return [
        (EmbedPart(texts[start:end], places[start:end], client), cost)
        for (start, end), cost in zip(bounds, costs, strict=True)
    ]


def _with_vectors(
    chunked: list[Encoded | Invalid | list[str] | None], vectors: Floats
) -> list[Encoded | Invalid | list[str] | None]:
    """Return each text with its share of `vectors` `(n, D)`."""
    answers: list[Encoded | Invalid | list[str] | None] = []
    for each in chunked:
        if not isinstance(each, Encoded):
            answers.append(each)
        else:
            answers.append(each._replace(vectors=vectors[: len(each.chunks)]))
            vectors = vectors[len(each.chunks) :]
    return answers


def _check_count(request: TextInput) -> None:
    """Raise `Invalid` if chunks are too few or too many for a context."""
    least = min(LEAST_CHUNKS, request.length)
    if isinstance(request.text, list) and not least <= len(request.text) <= request.length:
        expected = f"{least} to {request.length}" if least < request.length else f"{least}"
        raise Invalid(f"expected {expected} chunks, oldest first; got {len(request.text)}", pointer="/texts")


def _kind_of_context(request: TextInput, chunks: list[str]) -> str:
    return "context" if len(chunks) == request.length else "partial_context"


def _too_short(request: TextInput, count: int) -> Invalid:
    return Invalid(
        f"the text makes {count} chunks; expected at least {LEAST_CHUNKS}, or {request.length} for a whole context: a "
        "chunk is some 50 to 100 word-pieces, ending where a sentence or a paragraph ends",
        pointer="/text",
    )
