"""JSON to float32 arrays, and back.

A fast reader copies the numbers out without making Python objects of them (simdjson), and accepts only what it can
prove to be right. A strict reader reads everything else, and finds out what is wrong and where.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from operator import mul
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from lvm.errors import (
    Invalid,
    Malformed,
    ServiceError,
    TooLarge,
)
from models.vectors import Floats
from service.http.checks import Check, escaped, reject_unknown
from service.http.json_slices import LongArray, find_array
from service.http.octets import Shape, from_base64, has_small_squares, is_in_range, reject_non_finite
from service.overload.fairness import Work
from service.settings import NormPolicy

BOM = b"\xef\xbb\xbf"  # a byte order mark, which some editors and .NET write
OPENING = ord("[")
SHORTEST, UNIT = 1e-6, 0.01  # least length with a direction; how far from 1 a unit length may be, float16 and all
AT_ONCE = 2**19  # bytes that the fast reader reads in one go, in about a millisecond
QUICK = 2**14  # bytes that the strict reader reads in one go, in at most 3 milliseconds
MAX_STRICT = 2**22  # bytes of a body that the strict reader reads as a whole
MAX_VALUES = 20_000  # values and names in such a body, some 10 milliseconds
MAX_DEPTH = 1000  # of nested lists and objects
MAX_ESCAPES = 400_000  # backslashes in such a body
NOT_PROVED = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fields:
    """What a JSON body may hold: fields of vectors or of text (of which exactly one) and checked options.

    `vectors` maps a field to the number of leading axes that it adds to the shape of one item:
    0 for one item, 1 for many.
    """

    vectors: Mapping[str, int]
    options: Mapping[str, Check]
    texts: Mapping[str, Check] = field(default_factory=dict)


class HasInputShape(Protocol):
    """What answers a request, as far as a reader needs to know."""

    @property
    def shape(self) -> Shape:
        """The shape of one item."""
        ...


T = TypeVar("T")
ResolvedT = TypeVar("ResolvedT", bound=HasInputShape)
Resolve = Callable[[str, dict[str, Any]], ResolvedT]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Decoded(NamedTuple, Generic[T]):
    """What a body holds.

    Attributes:
        rows: float32 `(n, *shape)`; empty until a text is embedded.
        field: the field that they, or the text, came in.
        options: the options that were given, checked.
        target: what answers the request.
        answers_many: whether the answer is a list; it is one for a list of one item as well.
        text: the text, if that was sent.
        text_info: the members of the response that say how the text was read, once it is embedded.
    """

    rows: Floats
    field: str
    options: dict[str, Any]
    target: T
    answers_many: bool = False
    text: list[str] | str | None = None
    text_info: Mapping[str, Any] = NOTHING


NO_ROWS: Floats = np.empty((0, 1, 1), np.float32)


class JsonReader:
    """Reads the JSON bodies of one route; not thread-safe, because it keeps its parser's memory.

    `resolve(field, options)` returns what answers the request; it may raise if an option has no meaning.
    """

    def __init__(self, fields: Fields, max_rows: int) -> None:
        self._fields, self._max_rows = fields, max_rows
        self._known = {*fields.vectors, *fields.texts, *fields.options}
        self._places = (*fields.vectors, *fields.texts)
        self._parser, self._arrays = simdjson.Parser(), ArrayReader()

    def read_at_once(
        self, body: bytes, resolve: Resolve[ResolvedT], query: Mapping[str, Any] = NOTHING
    ) -> Decoded[ResolvedT] | None:
        """Return the rows and options of a JSON object; `null` is absent.

        Return None if that takes more than a millisecond: then use `read_in_slices`. `query` holds the options of the
        query string, which are checked already.

        Raises:
            Malformed: not JSON in UTF-8, or not an object.
            Invalid: a field is missing, unknown, given in body and query, or of the wrong kind, shape or range;
                with its pointer.
            TooLarge: too many items.
        """
        fast = None
        if len(body) <= AT_ONCE:
            try:
                fast = self.read_fast(body, resolve, query)
            except NOT_PROVED:
                self._parser = simdjson.Parser()  # the old one may be held by what it parsed
        if fast is None and len(body) <= QUICK:
            return self.read_strictly(body, resolve, query)
        return fast

    def read_in_slices(
        self, body: bytes, resolve: Resolve[ResolvedT], query: Mapping[str, Any] = NOTHING
    ) -> Work[Decoded[ResolvedT]]:
        """Return what `read_at_once` returns of a short body; yield between slices of a few milliseconds."""
        array = find_array(body, *self._fields.vectors)
        if array is None or not array.is_most_of_the_body:
            check_values(body)
            yield
            return self.read_strictly(body, resolve, query)
        rest = array.rest
        check_values(rest)
        field, value, options = self._members(parse_object(rest), query)
        if value != [] or self._is_in_an_option(options):
            check_values(body)
            yield
            return self.read_strictly(body, resolve, query)
        target = resolve(field, options)
        shape, many = target.shape, self._fields.vectors[field]
        if many:
            rows = yield from self._arrays.read(array, shape, f"/{field}", self._max_rows, TooLarge)
        else:
            rows = yield from self._arrays.read(array, shape[1:], f"/{field}", shape[0], Invalid)
            if len(rows) != shape[0]:
                raise Invalid(f"expected a list of {shape[0]}, got a list of {len(rows)}", pointer=f"/{field}")
            rows = rows[None]
        return Decoded(rows, field, options, target, bool(many))

    def _is_in_an_option(self, options: Mapping[str, Any]) -> bool:
        """Return whether an array that was found by the name of a field may be part of an option instead."""
        objects = (option for option in options.values() if isinstance(option, dict))
        return any(not self._fields.vectors.keys().isdisjoint(option) for option in objects)

    def read_fast(
        self, body: bytes, resolve: Resolve[ResolvedT], query: Mapping[str, Any] = NOTHING
    ) -> Decoded[ResolvedT] | None:
        """Return what is provably right; else return None, or raise anything: the strict reader decides."""
        if body.startswith(BOM):
            body = body.removeprefix(BOM)
            if body.startswith(BOM):
                return None  # simdjson passes over a second one
        document: Any = self._parser.parse(body)
        if not isinstance(document, simdjson.Object) or len(document) > len(self._known):
            return None
        names = [*document]
        fields = names if len(names) == 1 else self._fields_in(document, names)
        if len(fields) != 1 or fields[0] not in self._fields.vectors:
            return None
        (field,) = fields
        array: Any = document[field]
        if array is None:
            return None
        options: dict[str, Any] = {}
        brackets = 0
        if query or len(names) > 1:
            options, brackets = self._options_in(document, [name for name in names if name != field], query, body)
        target = resolve(field, options)
        if not self._fields.vectors[field]:
            rows = (
                from_base64(array, f"/{field}", target.shape)
                if isinstance(array, str)
                else _numbers(array, target.shape, body, brackets)
            )
            return None if rows is None else Decoded(rows[None], field, options, target)
        if len(array) > self._max_rows:
            return None
        rows = _numbers(array, (len(array), *target.shape), body, brackets)
        return None if rows is None else Decoded(rows, field, options, target, True)

    def _fields_in(self, document: Any, names: Sequence[str]) -> list[str]:
        """Return the fields of vectors that a parsed body gives; none if a name is unknown or given twice."""
        unique = set(names)
        if len(unique) != len(names) or not unique <= self._known:
            return []
        return [name for name in names if name in self._fields.vectors and document[name] is not None]

    def _options_in(
        self, document: Any, names: Sequence[str], query: Mapping[str, Any], body: bytes
    ) -> tuple[dict[str, Any], int]:
        """Return the options of a parsed body, checked, and how many opening brackets of the body are theirs."""
        given = {name: value for name in names if (value := document[name]) is not None}
        if all(isinstance(value, str | int | float | bool) for value in given.values()):
            return self._options(given, query), 0
        given = {name: _python(value) for name, value in given.items()}
        brackets = _brackets(given, body)
        return self._options(given, query), brackets

    def _options(self, given: Mapping[str, Any], query: Mapping[str, Any]) -> dict[str, Any]:
        """Check the options of a body and add those of the query string; raises `Invalid`."""
        options = {name: self._fields.options[name](value, f"/{name}") for name, value in given.items()}
        for name in query:
            if name in options:
                raise Invalid("given both in the body and in the query string", pointer=f"/{name}")
        return {**query, **options} if query else options

    def read_strictly(
        self, body: bytes, resolve: Resolve[ResolvedT], query: Mapping[str, Any] = NOTHING
    ) -> Decoded[ResolvedT]:
        """Return what a body holds, or raise what is wrong with it, and where. Slow and complete."""
        field, value, options = self._members(parse_object(body), query)
        if field in self._fields.texts:
            text = self._fields.texts[field](value, f"/{field}")
            return Decoded(NO_ROWS, field, options, resolve(field, options), text=text)
        target, many = resolve(field, options), self._fields.vectors[field]
        rows = _rows(value, f"/{field}", target.shape, many, self._max_rows)
        return Decoded(rows, field, options, target, bool(many))

    def _members(self, document: dict[str, Any], query: Mapping[str, Any]) -> tuple[str, Any, dict[str, Any]]:
        """Return the field of a body, its value, and the options, which are checked."""
        reject_unknown(document, self._known, "field")
        given = {name: value for name, value in document.items() if value is not None}
        present = [name for name in self._places if name in given]
        if len(present) != 1:
            expected = "exactly one of " if len(self._places) > 1 else ""
            raise Invalid(f"expected {expected}{', '.join(self._places)}", pointer="")
        (field,) = present
        value = given.pop(field)
        return field, value, self._options(given, query)


class ArrayReader:
    """Reads long arrays in parts; not thread-safe, because it keeps its parser's memory."""

    def __init__(self) -> None:
        self._parser = simdjson.Parser()

    def read(
        self, array: LongArray, shape: Shape, pointer: str, most: int, too_many: type[ServiceError]
    ) -> Work[Floats]:
        """Return the items of `shape`, at most `most`, as float32; yield between the parts.

        Raises:
            Malformed: a part is not JSON.
            Invalid: an item is of the wrong kind, shape or range, with its pointer.
            too_many: there are more than `most`.
        """
        if not array.is_of_strings and array.depth != len(shape) + 1:
            raise Invalid(f"expected lists nested {len(shape) + 1} deep, got {array.depth}", pointer=pointer)
        read: list[Floats] = []
        count = 0
        for part in array.parts(shape):
            if part is None:
                raise Invalid(f"expected an item of shape {shape}, got a longer one", pointer=f"{pointer}/{count}")
            text = b"".join((b"[", memoryview(array.body)[slice(*part)], b"]"))
            rows = self._read_fast(text, None, shape)
            if rows is None:
                rows = _part_strictly(text, shape, pointer, count)
            read.append(rows)
            count += len(rows)
            if count > most:
                raise too_many(f"too many items; expected at most {most}", pointer=pointer)
            yield
        return np.concatenate(read)

    def read_at_once(self, array: LongArray, shape: Shape) -> Floats | None:
        """Return an array of `shape` as float32, if it is provably one of at most `AT_ONCE` bytes."""
        return self._read_fast(array.text, shape) if array.end - array.start <= AT_ONCE else None

    def _read_fast(self, text: bytes, shape: Shape | None, item: Shape = ()) -> Floats | None:
        """Return the numbers of a JSON array of `shape`, or of any number of items; None if that is not proved."""
        try:
            items: Any = self._parser.parse(text)
            return _numbers(items, shape or (len(items), *item), text)
        except NOT_PROVED:
            self._parser = simdjson.Parser()
            return None


def run_to_end(work: Work[Answer]) -> Answer:
    """Run `work` to its end; return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def check_values(body: bytes) -> None:
    """Raise `Invalid` if a body would be long to read as a whole."""
    if len(body) > MAX_STRICT:
        raise Invalid(f"body is {len(body)} bytes; a body without a vector array may have at most {MAX_STRICT} bytes")
    octets = np.frombuffer(_without_strings(body), np.uint8)
    values = sum(np.count_nonzero(octets == mark) for mark in b",:[{")
    if values > MAX_VALUES:
        if _depth(octets) > MAX_DEPTH:
            raise Malformed(f"nested too deeply; expected at most {MAX_DEPTH} levels")
        raise Invalid(
            f"outside the vector array the body has {values} values and names; at most {MAX_VALUES} are allowed"
        )
    if body.count(b"\\") > MAX_ESCAPES:
        raise Invalid(f"more than {MAX_ESCAPES} escapes; send text as UTF-8")


def _without_strings(body: bytes) -> bytes:
    """Return JSON without its strings; as it is, if it has more strings than it may have values."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * MAX_VALUES:
        return body
    return b"".join(unescaped.split(b'"')[::2])


def _depth(octets: NDArray[np.uint8]) -> int:
    """Return how deep lists and objects are nested in JSON without brackets in its strings."""
    opening = (octets == ord("[")) | (octets == ord("{"))
    closing = (octets == ord("]")) | (octets == ord("}"))
    return int(np.cumsum(opening.astype(np.int8) - closing, dtype=np.int32).max(initial=0))


def normalised(policy: NormPolicy, asked: Decoded[T]) -> Decoded[T]:
    """Return vectors as `policy` asks: as they are, scaled to unit length, or rejected if they are not.

    Raises:
        Invalid: a vector is too short to have a direction, or must be of unit length and is not; with its pointer.
    """
    if policy == "accept":
        return asked
    lengths = np.sqrt(np.vecdot(asked.rows, asked.rows))
    wrong = lengths < SHORTEST if policy == "normalise" else np.abs(lengths - 1) > UNIT
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        place = at if asked.answers_many or asked.field == "octets" else at[1:]
        pointer = "".join(f"/{part}" for part in (asked.field, *place) if part != "octets")
        raise Invalid(f"a vector of length {lengths[at]:.3g}; expected unit length", pointer=pointer)
    return asked._replace(rows=asked.rows / lengths[..., None]) if policy == "normalise" else asked


def decode_tensor(data: Any, pointer: str, shape: Shape, max_rows: int) -> Floats:
    """Return float32 rows `shape` of parsed JSON numbers, nested or flat in row-major order, or of read ones.

    Raises:
        Invalid: not numbers, of another shape, or not finite in float32.
        TooLarge: more than `max_rows` rows.
    """
    if shape[0] > max_rows:
        raise TooLarge(f"{shape[0]} rows; expected at most {max_rows}", pointer=pointer)
    if isinstance(data, np.ndarray):
        return data.reshape(shape)
    is_nested = isinstance(data, list) and bool(data) and isinstance(data[0], list)
    return _array(data, pointer, shape if is_nested else (math.prod(shape),)).reshape(shape)


# Returns a value as JSON; float32 arrays in their shortest exact decimals.
encode_json: Callable[[Any], bytes] = partial(orjson.dumps, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_part(value: Any) -> orjson.Fragment:
    """Return a part of a body as JSON, which `encode_json` takes as it is."""
    return orjson.Fragment(orjson.dumps(value))


# ---- arrays


def _python(value: Any) -> Any:
    """Return a parsed option as Python objects; raises `ValueError` if the strict reader may read it differently."""
    if isinstance(value, simdjson.Array):
        return [_python(item) for item in value]
    if isinstance(value, simdjson.Object):
        names = list(value)
        if len(set(names)) != len(names):
            raise ValueError("duplicate key")
        return {name: _python(value[name]) for name in names}
    if isinstance(value, int) and value >= 10**19:
        raise ValueError("the strict reader makes a float of it")
    return value


def _brackets(options: Mapping[str, Any], body: bytes) -> int:
    """Return how many opening brackets of a body are those of its options.

    Raises:
        ValueError: a bracket in a string may be an escape.
    """
    if b"\\" in body:
        raise ValueError("escapes")
    return orjson.dumps(options).count(OPENING)


def _numbers(array: Any, shape: Shape, body: bytes, brackets_elsewhere: int = 0) -> Floats | None:
    """Return the numbers of a parsed array of `shape`, or None if that is not all that it holds.

    `brackets_elsewhere` of the opening brackets in `body` are not those of the array.
    """
    if not _has_shape(array, shape) or not _has_brackets(body, _lists_in(shape) + brackets_elsewhere):
        return None  # a number may hide in brackets of its own
    numbers: NDArray[np.float64] = np.ndarray(shape, np.float64, array.as_buffer(of_type="d"))
    if has_small_squares(numbers):
        return numbers.astype(np.float32)
    with np.errstate(over="ignore"):
        rows = numbers.astype(np.float32)
    return rows if is_in_range(rows) else None


def _has_shape(array: Any, shape: Shape) -> bool:
    """Return whether the lists of a parsed array are as long as `shape` says, none empty; raises `TypeError`."""
    if not 0 < len(array) == shape[0]:
        return False
    if len(shape) == 2:
        return {*map(len, array)} == {shape[1]}
    return len(shape) == 1 or all(_has_shape(item, shape[1:]) for item in array)


@lru_cache(maxsize=1024)
def _lists_in(shape: Shape) -> int:
    """Return how many lists an array of `shape` is made of."""
    return sum(accumulate(shape[:-1], mul, initial=1))


def _has_brackets(body: bytes, count: int) -> bool:
    """Return whether a body has exactly `count` opening brackets."""
    at = -1
    for _ in range(count):
        at = body.find(b"[", at + 1)
        if at < 0:
            return False
    return body.find(b"[", at + 1) < 0


def _part_strictly(text: bytes, shape: Shape, pointer: str, first: int) -> Floats:
    """Return the items of a part, of which the first is the one at `first`, or raise what is wrong and where."""
    items = parse_json(text)
    if not isinstance(items, list) or not items:
        raise Invalid("expected a non-empty list without a trailing comma", pointer=pointer)
    if shape:
        return np.stack([_array(item, f"{pointer}/{first + at}", shape) for at, item in enumerate(items)])
    try:
        return _array(items, "", (len(items),))
    except Invalid as error:
        at = int((error.pointer or "/0")[1:])
        raise Invalid(error.detail, pointer=f"{pointer}/{first + at}") from error


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, names checked to be unique; raises `Malformed`."""
    document = parse_json(body)
    if not isinstance(document, dict):
        raise Malformed("expected a JSON object")
    return document


def parse_json(body: bytes) -> Any:
    """Return the JSON value of a body, names checked to be unique; raises `Malformed`."""
    try:
        return json.loads(body.removeprefix(BOM).decode(), parse_int=_whole_or_float, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8, at byte {error.start}") from error
    except RecursionError as error:
        raise Malformed(f"nested too deeply; expected at most {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg}, at character {error.pos}") from error


def _whole_or_float(digits: str) -> int | float:
    return int(digits) if len(digits.lstrip("-")) < 20 else float(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        duplicate = max(counts, key=lambda name: counts[name])
        raise Malformed(f'duplicate key "{escaped(duplicate)}"')
    return document


def _rows(value: Any, pointer: str, shape: Shape, many: int, max_rows: int) -> Floats:
    if not many:
        return _array(value, pointer, shape)[None]
    if not isinstance(value, list) or not value:
        raise Invalid("expected a list that is not empty", pointer=pointer)
    if len(value) > max_rows:
        raise TooLarge(f"{len(value)} rows; expected at most {max_rows}", pointer=pointer)
    return np.stack([_array(item, f"{pointer}/{at}", shape) for at, item in enumerate(value)])


def _array(value: Any, pointer: str, shape: Shape) -> Floats:
    if isinstance(value, str):
        return from_base64(value, pointer, shape)
    _check_array(value, pointer, shape)
    with np.errstate(over="ignore"):
        array = np.array(value, np.float64).astype(np.float32)
    reject_non_finite(array, pointer)
    return array


def _check_array(value: Any, pointer: str, shape: Shape) -> None:
    if not shape:
        if type(value) not in (int, float):
            raise Invalid("expected a number", pointer=pointer)
        return
    if not isinstance(value, list) or len(value) != shape[0]:
        size = f" of {len(value)}" if isinstance(value, list) else ""
        raise Invalid(f"expected a list of {shape[0]}, got {type(value).__name__}{size}", pointer=pointer)
    for at, item in enumerate(value):
        _check_array(item, f"{pointer}/{at}", shape[1:])
