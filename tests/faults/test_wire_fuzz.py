"""Whatever bytes come in: rows come out, or an error of the contract, and nothing else; and two readers agree."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

from lvm.errors import Invalid, ServiceError
from models.vectors import Floats
from service.deploy.shadow import Shadow
from service.engines.router import make_router
from service.http import checks, codec
from service.http.codec import Decoded, Fields, JsonReader
from service.http.messages import Request
from service.http.octets import FLOAT16, decode_octets
from service.http.routes.oip import HEADER_LENGTH, Infer
from service.http.routes.predict import OPTIONS
from service.overload.fairness import Slicer
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.fakes import Shaped
from tests.faults.conftest import Injected, sizes

SHAPE, ROWS, SEED = (2, 3), 3, 20261123
STATUSES = {200, 400, 404, 413, 415, 422}
TEXTS = {"text": checks.passage(99), "texts": checks.passages(99)}
PREDICT = Fields({"context": 0, "contexts": 1}, OPTIONS, TEXTS)
RETRIEVE = Fields(
    {"query": 0, "context": 0},
    {"k": checks.whole(1, 9), "exclude": checks.wholes(5), "exclude_context": checks.flag, "model": checks.text},
    TEXTS,
)
WORDS = [
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b'"',
        b"\\",
        b"-",
        b".",
        b"e",
        b"0",
        b"1e999",
        b"-1e-999",
        b"NaN",
        b"Infinity",
    ),
    *(b"null", b"true", b"false", b'"context"', b'"contexts"', b'"query"', b'"k"', b'"model"', b'"exclude"', b'"data"'),
    *(b"\\u0000", b"\\ud800", b"\xef\xbb\xbf", b"\xff", b"\x00", b"\xed\xa0\x80", b"[[", b"]]", b"1" * 30, b"1" * 5000),
    *(b"[" * 2000, b'{"a":' * 500, b"3.4028236e38", b"1e9", b"1.0000001e9", b" ", b"\n", b"\t", b"//", b"0x1", b"01"),
    *(b'"parameters"', b'"binary_data_size"', b'"shape"', b'"datatype"', b"9223372036854775808", b"-0", b"5e-324"),
]
Decode = Callable[[bytes], Floats | None]  # None: text, and no rows yet


def number(random: Random) -> Any:
    return random.choice(
        [
            random.uniform(-1, 1),
            random.randint(-9, 9),
            0,
            1e9,
            -1e-40,
            10**19,
            True,
            None,
            "1",
            [1],
            2.5e9,
            float("nan"),
        ]
        if random.random() < 0.05
        else [random.uniform(-1, 1)]
    )


def nested(random: Random, *shape: int) -> Any:
    """Return lists of the shape, one level of which may have one item more or less."""
    if not shape:
        return number(random)
    size = shape[0] + (random.choice((-1, 1)) if random.random() < 0.02 else 0)
    return [nested(random, *shape[1:]) for _ in range(size)]


def item(random: Random, *shape: int) -> Any:
    if random.random() < 0.1:
        return base64.b64encode(random.randbytes(4 * int(np.prod(shape)))).decode()
    return nested(random, *shape)


def option(random: Random) -> Any:
    return random.choice(
        [1, 9, 0, 10, -1, 2**63, 1.0, True, False, None, "amn", "", "x" * 300, [], [1, 2], [-1], {}, "batch", "\ud800"]
    )


def some(random: Random, names: Any) -> dict[str, Any]:
    return {name: option(random) for name in random.sample(list(names), random.choice((0, 0, 0, 1, 2)))}


def words(random: Random) -> dict[str, Any]:
    said = [random.choice(("a passage", "", " ", "\ud800", "x" * 100, 7, None)) for _ in range(random.randint(0, 4))]
    return {"texts": said} if random.random() < 0.5 else {"text": (*said, "a passage")[0]}


def predict_body(random: Random) -> bytes:
    if random.random() < 0.1:
        return json.dumps({**words(random), **some(random, PREDICT.options)}).encode()
    many = random.random() < 0.5
    rows = [item(random, *SHAPE) for _ in range(random.randint(1, ROWS + 1))] if many else item(random, *SHAPE)
    return json.dumps({("contexts" if many else "context"): rows, **some(random, PREDICT.options)}).encode()


def retrieve_body(random: Random) -> bytes:
    if random.random() < 0.1:
        return json.dumps({**words(random), **some(random, RETRIEVE.options)}).encode()
    given = {"query": item(random, 3)} if random.random() < 0.5 else {"context": item(random, *SHAPE)}
    return json.dumps({**given, **some(random, RETRIEVE.options)}).encode()


def infer_body(random: Random) -> bytes:
    """Return an infer request; the length of its header comes first, where it has one."""
    count = random.randint(1, ROWS + 1)
    tensor = {"name": "context", "datatype": "FP32", "shape": [count, *SHAPE]}
    if random.random() < 0.5:
        flat = nested(random, count * 6) if random.random() < 0.5 else nested(random, count, *SHAPE)
        return json.dumps(
            {"inputs": [{**tensor, "data": flat}], **some(random, ("id", "parameters", "outputs"))}
        ).encode()
    tail = np.asarray(
        random.choices((0.0, 0.5, np.nan, np.inf, -1.0), (9, 9, 0.1, 0.1, 9), k=count * 6), "<f4"
    ).tobytes()
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(tail)}}]}).encode()
    return b"%d;" % len(head) + head + tail


def octets(random: Random) -> bytes:
    some = (0.5, -1.0, random.uniform(-9, 9), np.nan, 6e4)
    values = random.choices(some, (9, 9, 9, 0.02, 0.02), k=6 * random.randint(1, 4))
    return np.asarray(values, "<f4").tobytes() if random.random() < 0.5 else np.asarray(values, "<f2").tobytes()


def mutated(random: Random, body: bytes) -> bytes:
    """Return `body` after up to three of: a bit flipped, a part lost, doubled, moved, a word put in, cut short."""
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        at, end = sorted((random.randint(0, len(body)), random.randint(0, len(body))))
        end = min(end, at + 40)
        kind = random.randrange(6)
        if kind == 0 and at < len(body):
            body = body[:at] + bytes([body[at] ^ 1 << random.randrange(8)]) + body[at + 1 :]
        elif kind == 1:
            body = body[:at] + body[end:]
        elif kind == 2:
            body = body[:end] + body[at:end] + body[end:]
        elif kind == 3:
            body = body[:at] + body[end:] + body[at:end]
        elif kind == 4:
            body = body[:at] + random.choice(WORDS) + body[at:]
        else:
            body = body[:at]
    return body


def resolve(field: str, options: dict[str, Any]) -> Shaped:
    return Shaped((3,) if field == "query" else SHAPE)


def read(reader: JsonReader, body: bytes) -> Decoded[Shaped]:
    return reader.read_at_once(body, resolve) or codec.run_to_end(reader.read_in_slices(body, resolve))


def json_reader(fields: Fields) -> Decode:
    made = JsonReader(fields, ROWS)

    def decode(body: bytes) -> Floats | None:
        found = read(made, body)
        return found.rows if found.text is None else None

    return decode


def infer() -> Decode:
    settings = Settings(max_rows=ROWS)
    handler = Infer(make_router({}, settings, Metrics()), Shadow({}, 0, Metrics()), settings, Slicer())

    def decode(body: bytes) -> Floats:
        length, _, rest = body.partition(b";")
        headers = {HEADER_LENGTH: length} if length.isdigit() else {}
        request = Request(b"POST", "/v2/models/amn/infer", b"", headers)
        request.body = rest if length.isdigit() else body
        return codec.run_to_end(handler.parse(request, SHAPE)).rows

    return decode


FORMATS: dict[str, tuple[Callable[[Random], bytes], Decode]] = {
    "JSON of /predict": (predict_body, json_reader(PREDICT)),
    "JSON of /retrieve": (retrieve_body, json_reader(RETRIEVE)),
    "JSON and binary of infer": (infer_body, infer()),
    "octets, float32": (octets, lambda body: decode_octets(body, SHAPE, ROWS)),
    "octets, float16": (octets, lambda body: decode_octets(body, SHAPE, ROWS, FLOAT16)),
}


def inputs(make: Callable[[Random], bytes], count: int) -> Iterator[bytes]:
    random = Random(SEED)
    for _ in range(count):
        yield mutated(random, make(random))


def verdict(read: Callable[[], Decoded[Shaped]]) -> tuple[Any, ...]:
    """Return what a reader makes of a body: rows, field and options, or a status: of two faults, either may be told."""
    try:
        found = read()
    except ServiceError as error:
        return (error.status,)
    return 200, found.rows.tobytes(), found.text, found.field, found.options


@sizes(4_000, 250_000)
@pytest.mark.parametrize("name", FORMATS)
def test_no_input_ends_in_anything_but_rows_or_an_error_of_the_contract(
    count: int, name: str, injected: Injected
) -> None:
    make, decode = FORMATS[name]
    told = 0
    for body in inputs(make, count):
        status, rows = 200, None
        try:
            rows = decode(body)
        except ServiceError as error:
            status, told = error.status, told + 1
        assert status in STATUSES, body
        assert rows is None or (rows.dtype == np.float32 and 0 < len(rows) <= ROWS and np.isfinite(rows).all()), body
    assert 0.1 * count < told < 0.95 * count, "the inputs are all right or all wrong: they find nothing"
    injected(f"malformed and mutated {name}", "rows, or an error of the contract", count)


@sizes(2_000, 100_000)
@pytest.mark.parametrize(("fields", "make"), [(PREDICT, predict_body), (RETRIEVE, retrieve_body)])
def test_the_two_readers_of_json_say_the_same(
    count: int, fields: Fields, make: Callable[[Random], bytes], injected: Injected
) -> None:
    reader = JsonReader(fields, ROWS)
    for body in inputs(make, count):
        quick, slow = partial(read, reader, body), partial(reader.read_strictly, body, resolve)
        assert verdict(quick) == verdict(slow), body
    injected("bodies read twice, quickly and strictly", "the same rows, or the same status", count)


@sizes(2_000, 100_000)
def test_any_query_string_is_options_or_invalid(count: int, injected: Injected) -> None:
    random = Random(SEED)
    for _ in range(count):
        given = {random.choice((*RETRIEVE.options, "x")): random.choice(WORDS).decode("latin-1") for _ in range(2)}
        with suppress(Invalid):
            assert checks.query_options(given, RETRIEVE.options).keys() <= RETRIEVE.options.keys()
    injected("query strings", "options, or 422", count)
