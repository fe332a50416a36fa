"""JSON of the service beside the fewest calls that read and write it: microseconds of processor time, and the ratio.

The bare reader checks neither shape nor range nor names; the bare writer writes the vectors alone. Both have the
libraries of the service: simdjson, orjson, numpy. Each case has many different bodies: the processor learns a body that
it has read before, and then reads it in two thirds of the time.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Iterator, Sequence
from time import thread_time
from typing import Any, NamedTuple

import numpy as np
import orjson
import simdjson

from bench import machine
from bench.untrained import draw_contexts
from loadtest.tables import table
from models.vectors import Floats
from service.engines.predict import Prediction
from service.engines.router import Routed
from service.http.codec import Decoded, Fields, JsonReader, encode_json, run_to_end
from service.http.messages import Request, Stages
from service.http.octets import Shape, encode_base64
from service.http.routes import oip, predict
from service.http.routes.common import MadeBy
from service.overload.fairness import Slicer
from service.settings import read_settings

CONTEXTS = 64  # of each case, in one body or in several
DIMS, COUNTS = (384, 768), (1, 8, 64)
MODEL = MadeBy("amn", "0123456789ab", "primary", None)


class Case(NamedTuple):
    """What the service and the bare calls do with the same inputs, each for one input."""

    name: str
    inputs: Sequence[Any]
    ours: Callable[[Any], Any]
    bare: Callable[[Any], Any]


class Times(NamedTuple):
    """Microseconds of an input, the least of all rounds, and bytes of the JSON."""

    name: str
    size: int
    bare: float
    ours: float


def main(argv: Sequence[str] | None = None) -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=50, help="of both in turn, default 50")
    options = parser.parse_args(argv)
    described = machine.describe()
    print(described["processor"], described["date"], f"least of {options.rounds} rounds", sep="; ")
    print(to_markdown([measure(case, options.rounds) for case in cases()]))


def cases(dims: Sequence[int] = DIMS) -> Iterator[Case]:
    """Yield all cases: bodies that are read, then answers that are written."""
    for dim in dims:
        contexts = draw_contexts(CONTEXTS, dim)
        for count in COUNTS:
            yield from _read_predict(contexts.reshape(-1, count, *contexts.shape[1:]))
        yield _read_base64(contexts)
        yield _read_infer(contexts[:, None])
    for dim in dims:
        vectors = np.ascontiguousarray(draw_contexts(CONTEXTS, dim)[:, -1])
        for count in (1, CONTEXTS):
            yield _write_predict(vectors.reshape(-1, count, dim))
        yield _write_infer(vectors)


def measure(case: Case, rounds: int) -> Times:
    """Return the times of a case; raises `ValueError` if the service reads other numbers than the bare reader."""
    read, expected = case.ours(case.inputs[0]), case.bare(case.inputs[0])
    if not isinstance(read, bytes) and not np.array_equal(read, expected):
        raise ValueError(f"{case.name}: other numbers")
    size = len(read) if isinstance(read, bytes) else len(case.inputs[0])
    spent = [[_seconds(call, case.inputs) for call in (case.bare, case.ours)] for _ in range(rounds)]
    bare, ours = (1e6 * min(each) / len(case.inputs) for each in zip(*spent, strict=True))
    return Times(case.name, size, bare, ours)


def to_markdown(rows: Sequence[Times]) -> str:
    """Return a table, a row per case."""
    heads = ("case", "bytes", "bare, µs", "service, µs", "service / bare")
    return table(
        heads,
        [
            (row.name, f"{row.size:,}", f"{row.bare:.1f}", f"{row.ours:.1f}", f"{row.ours / row.bare:.2f}")
            for row in rows
        ],
    )


def _seconds(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    began = thread_time()
    for each in inputs:
        call(each)
    return thread_time() - began


def _read_predict(contexts: Floats) -> Iterator[Case]:
    """Yield the bodies of contexts `(bodies, n, T, D)`, once with the digits of float64 and once with the fewest."""
    count, shape = contexts.shape[1], contexts.shape[2:]
    field, given = ("context", contexts[:, 0]) if count == 1 else ("contexts", contexts)
    parser: Any = simdjson.Parser()

    def bare(body: bytes) -> Floats:
        return _floats(parser.parse(body)[field], (count, *shape))

    for digits in ("float64", "float32"):
        bodies = [json.dumps({field: each.tolist()}).encode() for each in given]
        if digits == "float32":
            bodies = [encode_json({field: each}) for each in given]
        yield Case(f"read {count} x {_spelled(shape)}, {digits}", bodies, _reader(shape), bare)


def _read_base64(contexts: Floats) -> Case:
    shape = contexts.shape[1:]
    bodies = [encode_json({"context": encode_base64(context)}) for context in contexts]
    parser: Any = simdjson.Parser()

    def bare(body: bytes) -> Floats:
        return np.frombuffer(base64.b64decode(parser.parse(body)["context"]), np.float32).reshape(1, *shape)

    return Case(f"read 1 x {_spelled(shape)}, base64", bodies, _reader(shape), bare)


def _read_infer(contexts: Floats) -> Case:
    shape = contexts.shape[2:]
    unused: Any = None
    tensor = {"name": oip.INPUT, "datatype": oip.DATATYPE, "shape": contexts.shape[1:]}
    bodies = [encode_json({"inputs": [{**tensor, "data": each.ravel()}]}) for each in contexts]
    route = oip.Infer(unused, unused, read_settings(), Slicer())
    parser: Any = simdjson.Parser()

    def bare(body: bytes) -> Floats:
        return _floats(parser.parse(body)["inputs"].at_pointer("/0/data"), (1, *shape))

    def ours(body: bytes) -> Floats:
        request = Request(b"POST", "/v2/models/amn/infer", b"", {})
        request.body = body
        return run_to_end(route.parse(request, shape)).rows

    return Case(f"read infer, 1 x {_spelled(shape)}, float32", bodies, ours, bare)


def _write_predict(vectors: Floats) -> Case:
    """Return the answers with vectors `(answers, n, D)`."""
    count, dim = vectors.shape[1:]
    decoded: Decoded[Any] = Decoded(vectors, "contexts", {}, None, answers_many=count > 1)

    def bare(given: tuple[Floats, Stages]) -> bytes:
        body = {"vectors": given[0]} if count > 1 else {"vector": given[0][0]}
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    def ours(given: tuple[Floats, Stages]) -> bytes:
        return predict.encode_answer(decoded, given[0], MODEL, given[1])

    return Case(f"write {count} x {dim}", [*zip(vectors, _stages(len(vectors)), strict=True)], ours, bare)


def _write_infer(vectors: Floats) -> Case:
    parsed = oip.ParsedRequest(vectors, None, False)

    def bare(rows: Floats) -> bytes:
        return orjson.dumps({"data": rows.ravel()}, option=orjson.OPT_SERIALIZE_NUMPY)

    def ours(rows: Floats) -> bytes:
        return oip.encode_answer(parsed, Routed(Prediction(rows, "amn", "1", 0, 0, 1), "primary", None))[0]

    return Case(f"write infer, {len(vectors)} x {vectors.shape[1]}", [vectors], ours, bare)


class _Target(NamedTuple):
    """What answers a request, as far as a reader needs to know."""

    shape: Shape


def _reader(shape: Shape) -> Callable[[bytes], Floats]:
    """Return a function from a body of /predict to its contexts."""
    reader = JsonReader(Fields({"context": 0, "contexts": 1}, predict.OPTIONS), CONTEXTS)
    target = _Target(shape)

    def resolve(field: str, options: dict[str, Any]) -> _Target:
        return target

    def read(body: bytes) -> Floats:
        decoded = reader.read_at_once(body, resolve)
        return (run_to_end(reader.read_in_slices(body, resolve)) if decoded is None else decoded).rows

    return read


def _floats(array: Any, shape: Shape) -> Floats:
    """Return the numbers of an array of simdjson."""
    return np.frombuffer(array.as_buffer(of_type="d")).astype(np.float32).reshape(shape)


def _stages(count: int) -> list[Stages]:
    """Return times with all their digits, as clocks give them."""
    seconds = np.random.default_rng(0).random((count, 3)) / 1e3
    return [dict(zip(("decode", "queue", "infer"), each, strict=True)) for each in seconds.tolist()]


def _spelled(shape: Shape) -> str:
    return " x ".join(map(str, shape))


if __name__ == "__main__":
    main()
