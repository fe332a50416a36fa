"""Bytes <-> float32 arrays. The one place that checks shape and finiteness; the same verdict for all wires.

JSON is read twice over only when something is wrong with it: simdjson copies the numbers out without
making Python objects of them, and accepts only what it can prove right; anything else goes to
the strict reader, which finds out what is wrong and where.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from lvm.errors import (
    Invalid,
    Malformed,
    ServiceError,
    TooLarge,
    UnsupportedMediaType,
)
from models.vectors import Floats
from service.http.headers import MediaType, media_type
from service.http.json_slices import LongArray, find_array
from service.overload.fairness import Work
from service.settings import NormPolicy

JSON, OCTETS = b"application/json", b"application/octet-stream"
FLOAT32, FLOAT16 = np.dtype("<f4"), np.dtype("<f2")
DTYPES: dict[bytes, np.dtype[Any]] = {b"float32": FLOAT32, b"float16": FLOAT16}
BOM = b"\xef\xbb\xbf"  # a byte order mark, which some editors and .NET write
OPENING = ord("[")
LARGEST = 1e9  # vectors have unit length; a square that overflows float32 is nobody's embedding
SHORTEST, UNIT = 1e-6, 0.01  # least length with a direction; how far from 1 a unit length may be, float16 and all
AT_ONCE = 2**19  # bytes that the fast reader reads without a break, about a millisecond
QUICK = 2**14  # bytes that the strict reader reads without a break, at most 3 milliseconds
MAX_STRICT = 2**22  # bytes of a body that the strict reader reads as a whole
MAX_VALUES = 20_000  # values and names in such a body, some 10 milliseconds
MAX_DEPTH = 1000  # of nested lists and objects
MAX_ESCAPES = 400_000  # backslashes in such a body
NOT_PROVED = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)
Shape = tuple[int, ...]
Check = Callable[[Any, str], Any]
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


class Decoded(NamedTuple):
    """Float32 rows `(n, *shape)`, the field they came in, and the options that were given.

    Text comes as `words` without rows; once these are made of it, `heard` is what the answer says of how it was read.
    """

    rows: Floats
    field: str
    options: dict[str, Any]
    words: list[str] | str | None = None
    heard: Mapping[str, Any] | None = None
    octets_of_many: bool = False

    @property
    def is_many(self) -> bool:
        """Whether many were sent, if only one of them, so that many are answered."""
        return self.octets_of_many or self.field == "contexts"


NO_ROWS: Floats = np.empty((0, 1, 1), np.float32)
NO_OPTIONS: Mapping[str, Any] = {}


ShapeOf = Callable[[str, dict[str, Any]], Shape]


class JsonReader:
    """Reads the JSON bodies of one route; for one thread, because it keeps its parser's memory.

    `shape_of(field, options)` tells the shape of one item, and may raise where an option means nothing.
    """

    def __init__(self, fields: Fields, max_rows: int) -> None:
        self._fields, self._max_rows = fields, max_rows
        self._known = {*fields.vectors, *fields.texts, *fields.options}
        self._places = (*fields.vectors, *fields.texts)
        self._parser, self._arrays = simdjson.Parser(), ArrayReader()

    def read(self, body: bytes, shape_of: ShapeOf, query: Mapping[str, Any] = NO_OPTIONS) -> Decoded:
        """Return the rows and options of a JSON object; `null` is absent.

        `query` holds the options of the query string, which are checked already.

        Raises:
            Malformed: not JSON in UTF-8, or not an object.
            Invalid: a field is missing, unknown, given in body and query, or of the wrong kind, shape or range;
                with its pointer.
            TooLarge: too many items.
        """
        return self.read_at_once(body, shape_of, query) or drained(self.read_in_slices(body, shape_of, query))

    def read_at_once(self, body: bytes, shape_of: ShapeOf, query: Mapping[str, Any] = NO_OPTIONS) -> Decoded | None:
        """Return what `read` returns, or None if that takes longer than a moment: then read in slices."""
        fast = None
        if len(body) <= AT_ONCE:
            try:
                fast = self.read_fast(body, shape_of, query)
            except NOT_PROVED:
                self._parser = simdjson.Parser()  # the old one may be held by what it parsed
        if fast is None and len(body) <= QUICK:
            return self.read_strictly(body, shape_of, query)
        return fast

    def read_in_slices(self, body: bytes, shape_of: ShapeOf, query: Mapping[str, Any] = NO_OPTIONS) -> Work[Decoded]:
        """Return what `read` returns; yield between slices of a few milliseconds."""
        array = find_array(body, *self._fields.vectors)
        if array is None or not array.is_most_of_the_body:
            check_values(body)
            yield
            return self.read_strictly(body, shape_of, query)
        rest = array.rest
        check_values(rest)
        field, value, options = self._members(parse_object(rest), query)
        if value != []:
            raise Invalid(f"want exactly one of {', '.join(self._places)}", pointer="")
        shape, many = shape_of(field, options), self._fields.vectors[field]
        if many:
            rows = yield from self._arrays.read(array, shape, f"/{field}", self._max_rows, TooLarge)
        else:
            rows = yield from self._arrays.read(array, shape[1:], f"/{field}", shape[0], Invalid)
            if len(rows) != shape[0]:
                raise Invalid(f"want a list of {shape[0]}, not list of {len(rows)}", pointer=f"/{field}")
            rows = rows[None]
        return Decoded(rows, field, options)

    def read_fast(self, body: bytes, shape_of: ShapeOf, query: Mapping[str, Any] = NO_OPTIONS) -> Decoded | None:
        """Return what is provably right, else None (or raise anything): the strict reader decides then."""
        body = body.removeprefix(BOM)
        if body.startswith(BOM):
            return None  # simdjson passes over a second one
        document: Any = self._parser.parse(body)
        if not isinstance(document, simdjson.Object) or len(document) > len(self._known):
            return None
        names = list(document)
        unique = set(names)
        if len(unique) != len(names) or not unique <= self._known:
            return None
        given = {name: value for name in names if (value := document[name]) is not None}
        field = next((name for name in given if name in self._fields.vectors), None)
        if field is None:
            return None
        array = given.pop(field)
        if not all(map(_plain, given.values())):
            return None
        options = self._options(given, query)
        rows = _numbers(array, self._fields.vectors[field], shape_of(field, options), self._max_rows, body)
        return None if rows is None else Decoded(rows, field, options)

    def _options(self, given: Mapping[str, Any], query: Mapping[str, Any]) -> dict[str, Any]:
        """Check the options of a body and add those of the query string; raises `Invalid`."""
        options = {name: self._fields.options[name](value, f"/{name}") for name, value in given.items()}
        for name in query:
            if name in options:
                raise Invalid("given in the body and in the query string", pointer=f"/{name}")
        return {**query, **options} if query else options

    def read_strictly(self, body: bytes, shape_of: ShapeOf, query: Mapping[str, Any] = NO_OPTIONS) -> Decoded:
        """Return what a body says, or raise what is wrong with it and where; slow and complete."""
        field, value, options = self._members(parse_object(body), query)
        if field in self._fields.texts:
            return Decoded(NO_ROWS, field, options, self._fields.texts[field](value, f"/{field}"))
        shape, many = shape_of(field, options), self._fields.vectors[field]
        return Decoded(_rows(value, f"/{field}", shape, many, self._max_rows), field, options)

    def _members(self, document: dict[str, Any], query: Mapping[str, Any]) -> tuple[str, Any, dict[str, Any]]:
        """Return the field of a body, its value, and the options, which are checked."""
        refuse_unknown(document, self._known, "field")
        given = {name: value for name, value in document.items() if value is not None}
        present = [name for name in self._places if name in given]
        if len(present) != 1:
            raise Invalid(f"want exactly one of {', '.join(self._places)}", pointer="")
        (field,) = present
        value = given.pop(field)
        return field, value, self._options(given, query)


class ArrayReader:
    """Reads long arrays in parts; for one thread, because it keeps its parser's memory."""

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
            raise Invalid(f"want lists nested {len(shape) + 1} deep, not {array.depth}", pointer=pointer)
        read: list[Floats] = []
        count = 0
        for part in array.parts(shape):
            if part is None:
                raise Invalid(f"want an item of shape {shape}, this one is longer", pointer=f"{pointer}/{count}")
            rows = self._part(b"[" + bytes(array.body[slice(*part)]) + b"]", shape, pointer, count)
            read.append(rows)
            count += len(rows)
            if count > most:
                raise too_many(f"more than {most} items", pointer=pointer)
            yield
        return np.concatenate(read)

    def _part(self, text: bytes, shape: Shape, pointer: str, first: int) -> Floats:
        rows = None
        try:
            rows = _numbers(self._parser.parse(text), 1, shape, len(text), text)
        except NOT_PROVED:
            self._parser = simdjson.Parser()
        return _part_strictly(text, shape, pointer, first) if rows is None else rows


def drained(work: Work[Answer]) -> Answer:
    """Return what `work` returns, without a break."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def check_values(body: bytes) -> None:
    """Raise `Invalid` if a body would be long to read as a whole."""
    if len(body) > MAX_STRICT:
        raise Invalid(f"{len(body)} bytes without a long array of numbers in a field that takes one")
    octets = np.frombuffer(body, np.uint8)
    values = sum(np.count_nonzero(octets == mark) for mark in b",:[{")
    if values > MAX_VALUES:
        if _depth(octets) > MAX_DEPTH:
            raise Malformed("nested too deeply")
        raise Invalid(f"{values} values and names, at most {MAX_VALUES} beside a long array of numbers")
    if np.count_nonzero(octets == ord("\\")) > MAX_ESCAPES:
        raise Invalid(f"more than {MAX_ESCAPES} escapes; write text in UTF-8")


def _depth(octets: NDArray[np.uint8]) -> int:
    """Return how deep lists and objects are nested in JSON without brackets in its strings."""
    opening = (octets == ord("[")) | (octets == ord("{"))
    closing = (octets == ord("]")) | (octets == ord("}"))
    return int(np.cumsum(opening.astype(np.int8) - closing, dtype=np.int32).max(initial=0))


class OctetType(NamedTuple):
    """What a media type says of octets: the type of the numbers, and their shape if it is given."""

    dtype: np.dtype[Any] = FLOAT32
    shape: Shape | None = None


@lru_cache(maxsize=256)
def octet_type(header: bytes) -> OctetType:
    """Return what the media type `application/octet-stream` of a header says of the octets.

    `dtype=float16` halves the bytes; without a dtype they are float32. `shape=2x5x384`, or `shape="2,5,384"`, is
    their shape. Other parameters are ignored.

    Raises:
        UnsupportedMediaType: another dtype.
        Invalid: a shape that is malformed, or given more than once.
    """
    named = media_type(header) or MediaType(OCTETS, ())
    dtype, shapes = dtype_of(named), named.values(b"shape")
    if len(shapes) > 1:
        raise Invalid("the Content-Type has more than one shape; expected one")
    return OctetType(dtype, _shape(shapes[0]) if shapes else None)


def dtype_of(named: MediaType) -> np.dtype[Any]:
    """Return the type of the numbers in octets; raises `UnsupportedMediaType` as `octet_type`."""
    dtypes = [value.lower() for value in named.values(b"dtype")]
    if len(dtypes) > 1 or (dtypes and dtypes[0] not in DTYPES):
        raise UnsupportedMediaType("unsupported dtype of application/octet-stream; expected float32 or float16")
    return DTYPES[dtypes[0]] if dtypes else FLOAT32


@lru_cache(maxsize=256)
def octets_of(dtype: np.dtype[Any], shape: Shape) -> bytes:
    """Return the media type of octets of that dtype and shape."""
    return b"%b; dtype=%b; shape=%b" % (OCTETS, dtype.name.encode(), spelled(shape).encode())


def spelled(shape: Shape) -> str:
    """Return a shape as a media type carries it: `2x5x384`."""
    return "x".join(map(str, shape))


def _shape(value: bytes) -> Shape:
    sizes = [size.strip() for size in re.split(b"[xX,]", value)]
    if not all(size.isdigit() and len(size) < 10 and int(size) for size in sizes):
        raise Invalid("malformed shape in the Content-Type; expected positive sizes, for example shape=2x5x384")
    return tuple(map(int, sizes))


def held_to(policy: NormPolicy, asked: Decoded) -> Decoded:
    """Return vectors as `policy` wants their lengths: as they are, of unit length, or so or refused.

    Raises:
        Invalid: one has no direction, or is not of unit length where it must be; the pointer says which.
    """
    if policy == "accept":
        return asked
    lengths = np.sqrt(np.vecdot(asked.rows, asked.rows))
    wrong = lengths < SHORTEST if policy == "normalise" else np.abs(lengths - 1) > UNIT
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        place = at[1:] if asked.field in ("context", "query") else at
        pointer = "".join(f"/{part}" for part in (asked.field, *place) if part != "octets")
        raise Invalid(f"a vector of length {lengths[at]:.3g}, want unit length", pointer=pointer)
    return asked._replace(rows=asked.rows / lengths[..., None]) if policy == "normalise" else asked


def read_octets(body: bytes, kind: OctetType, item: Shape, max_rows: int, *, many: bool) -> Floats:
    """Read the rows `(n, *item)` of a body whose Content-Type says `kind`; more than one only if `many` may be sent.

    Raises:
        Invalid: the shape is not the net's, or not that of the bytes; or there are several rows without a shape.
        Malformed, TooLarge: as `decode_octets`.
    """
    if kind.shape is None:
        _check_alone(len(body), kind.dtype, item, max_rows if many else None)
    else:
        _check_shape(kind.shape, item, many)
        _check_size(len(body), kind.dtype, kind.shape)
    return decode_octets(body, item, max_rows, kind.dtype)


def _check_alone(length: int, dtype: np.dtype[Any], item: Shape, most: int | None) -> None:
    """Raise `Invalid` if bytes without a shape are several rows, which could be divided in another way.

    Up to `most` rows may be sent with a shape; None means one row only.
    """
    size = dtype.itemsize * math.prod(item)
    if length <= size or length % size or (most is not None and length > most * size):
        return
    example = octets_of(dtype, (length // size, *item)).decode()
    hint = f", or their shape in the Content-Type: {example}" if most is not None else ""
    raise Invalid(f"body is {length} bytes without a shape; expected {size} ({dtype.name}, shape {item}){hint}")


def _check_shape(shape: Shape, item: Shape, many: bool) -> None:
    if shape == item or (many and shape[1:] == item):
        return
    more = f" or (n, {', '.join(map(str, item))})" if many else ""
    raise Invalid(f"octets of shape {shape}; expected {item}{more}")


def _check_size(length: int, dtype: np.dtype[Any], shape: Shape) -> None:
    size = dtype.itemsize * math.prod(shape)
    if length != size:
        raise Invalid(f"body is {length} bytes; expected {size} ({dtype.name}, shape {shape})")


def decode_octets(body: bytes, shape: Shape, max_rows: int, dtype: np.dtype[Any] = FLOAT32) -> Floats:
    """Read raw little-endian rows `(n, *shape)`; float32 without copying them.

    Raises:
        Malformed: the length is not a whole, positive number of rows.
        Invalid: a value is not finite, with the pointer it would have in JSON.
        TooLarge: more than `max_rows` rows.
    """
    size = dtype.itemsize * math.prod(shape)
    if not body or len(body) % size:
        raise Malformed(f"body is {len(body)} bytes; expected a multiple of {size} ({dtype.name}, shape {shape})")
    if len(body) > max_rows * size:
        raise TooLarge(f"{len(body) // size} rows, at most {max_rows}")
    rows: Floats = np.frombuffer(body, dtype).reshape(-1, *shape).astype(np.float32, copy=False)
    _refuse_non_finite(rows, "")
    return rows


def query_options(given: Mapping[str, str], fields: Fields) -> dict[str, Any]:
    """Return the options of a query string, held to the same checks as those of a JSON body.

    Raises:
        Invalid: an option is unknown, of the wrong kind or out of range.
    """
    refuse_unknown(given, fields.options, "option")
    return {name: _from_query(fields.options[name], value, f"/{name}") for name, value in given.items()}


def _from_query(check: Check, value: str, pointer: str) -> Any:
    """Check a query option as the word it is, else as the JSON that it may be: a number, true, false, a list."""
    try:
        return check(value, pointer)
    except Invalid:
        return check(_json_or_word(value), pointer)


def _json_or_word(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def refuse_unknown(names: Iterable[str], known: Collection[str], what: str, pointer: str = "") -> None:
    """Raise `Invalid` if one of `names`, which are members of what `pointer` points at, is not `known`."""
    unknown = sorted(name for name in names if name not in known)
    if unknown:
        name = _escaped(unknown[0])
        expected = ", ".join(sorted(known)) or "none"
        raise Invalid(f'unknown {what} "{name}"; known: {expected}', pointer=f"{pointer}/{name}")


def decode_tensor(data: Any, pointer: str, shape: Shape, max_rows: int) -> Floats:
    """Return float32 rows `shape` of parsed JSON numbers, nested or flat in row-major order, or of read ones.

    Raises:
        Invalid: not numbers, of another shape, or not finite in float32.
        TooLarge: more than `max_rows` rows.
    """
    if shape[0] > max_rows:
        raise TooLarge(f"{shape[0]} rows, at most {max_rows}", pointer=pointer)
    if isinstance(data, np.ndarray):
        return data.reshape(shape)
    is_nested = isinstance(data, list) and bool(data) and isinstance(data[0], list)
    return _array(data, pointer, shape if is_nested else (math.prod(shape),)).reshape(shape)


def encode_octets(vectors: Floats, dtype: np.dtype[Any] = FLOAT32) -> bytes:
    """Return raw little-endian numbers."""
    return np.ascontiguousarray(vectors, dtype).tobytes()


def encode_json(body: dict[str, Any]) -> bytes:
    """Return `body` as JSON; float32 arrays in their shortest exact decimals."""
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_base64(vector: Floats) -> str:
    """Return little-endian float32 as base64."""
    return base64.b64encode(encode_octets(vector)).decode()


# ---- checks of options, each (value, pointer) -> value


def text(value: Any, pointer: str) -> str:
    """A short string."""
    if not isinstance(value, str) or not 0 < len(value) <= 200 or _plain_text(value) != value:
        raise Invalid("want a string of 1 to 200 characters", pointer=pointer)
    return value


def passage(most: int) -> Check:
    """A text of at most `most` characters that is not blank."""

    def check(value: Any, pointer: str) -> str:
        if not isinstance(value, str) or not value.strip() or _plain_text(value) != value:
            raise Invalid("want a string that is not blank", pointer=pointer)
        if len(value) > most:
            raise TooLarge(f"{len(value)} characters, at most {most}", pointer=pointer)
        return value

    return check


def passages(most: int) -> Check:
    """A list of texts, of at most `most` characters together, none of them blank."""
    each = passage(most)

    def check(value: Any, pointer: str) -> list[str]:
        if not isinstance(value, list) or not value:
            raise Invalid("want a list of strings that is not empty", pointer=pointer)
        texts = [each(item, f"{pointer}/{at}") for at, item in enumerate(value)]
        each("".join(texts), pointer)
        return texts

    return check


def one_of(*choices: str) -> Check:
    """One of a few words."""

    def check(value: Any, pointer: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise Invalid(f"want one of {', '.join(choices)}", pointer=pointer)
        return value

    return check


def whole(least: int, most: int) -> Check:
    """A whole number in a range, 10.0 as well as 10; booleans are none."""

    def check(value: Any, pointer: str) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise Invalid(f"want a whole number from {least} to {most}", pointer=pointer)
        return value

    return check


def wholes(most: int) -> Check:
    """A list of at most `most` whole numbers, not negative."""
    each = whole(0, 2**53)

    def check(value: Any, pointer: str) -> list[int]:
        if not isinstance(value, list) or len(value) > most:
            raise Invalid(f"want a list of at most {most} ids", pointer=pointer)
        return [each(item, f"{pointer}/{at}") for at, item in enumerate(value)]

    return check


def flag(value: Any, pointer: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Invalid("want true or false", pointer=pointer)
    return value


# ---- arrays


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _numbers(array: Any, many: int, shape: Shape, max_rows: int, body: bytes) -> Floats | None:
    """Return the numbers of a parsed array as rows, or None if that is not all that it holds."""
    count = len(array) if many else 1
    if not 0 < count <= max_rows or (shape and not _regular(list(array) if many else [array], shape)):
        return None
    brackets = sum(math.prod([count, *shape[:axis]]) for axis in range(len(shape)))
    if np.count_nonzero(np.frombuffer(body, np.uint8) == OPENING) != brackets + many:
        return None  # a number may hide in brackets of its own
    flat = np.frombuffer(array.as_buffer(of_type="d"), np.float64)
    with np.errstate(over="ignore"):
        rows: Floats = flat.astype(np.float32).reshape(count, *shape)
    return rows if np.abs(rows).max() <= LARGEST else None


def _part_strictly(text: bytes, shape: Shape, pointer: str, first: int) -> Floats:
    """Return the items of a part, of which the first is the one at `first`, or raise what is wrong and where."""
    items = parse_json(text)
    if not isinstance(items, list) or not items:
        raise Invalid("want a list that is not empty, and no comma behind its last item", pointer=pointer)
    if shape:
        return np.stack([_array(item, f"{pointer}/{first + at}", shape) for at, item in enumerate(items)])
    try:
        return _array(items, "", (len(items),))
    except Invalid as error:
        at = int((error.pointer or "/0")[1:])
        raise Invalid(error.detail, pointer=f"{pointer}/{first + at}") from error


def _regular(items: Sequence[Any], shape: Shape) -> bool:
    for length in shape[:-1]:
        if any(len(item) != length for item in items):
            return False
        items = [row for item in items for row in item]
    return all(len(item) == shape[-1] for item in items)


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, names checked to be unique; raises `Malformed`."""
    document = parse_json(body)
    if not isinstance(document, dict):
        raise Malformed("want a JSON object")
    return document


def parse_json(body: bytes) -> Any:
    """Return the JSON value of a body, names checked to be unique; raises `Malformed`."""
    try:
        return json.loads(body.removeprefix(BOM).decode(), parse_int=_whole_or_float, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg} at character {error.pos}") from error


def _whole_or_float(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise Malformed("a name stands twice in one object")
    return document


def _rows(value: Any, pointer: str, shape: Shape, many: int, max_rows: int) -> Floats:
    if not many:
        return _array(value, pointer, shape)[None]
    if not isinstance(value, list) or not value:
        raise Invalid("want a list that is not empty", pointer=pointer)
    if len(value) > max_rows:
        raise TooLarge(f"{len(value)} rows, at most {max_rows}", pointer=pointer)
    return np.stack([_array(item, f"{pointer}/{at}", shape) for at, item in enumerate(value)])


def _array(value: Any, pointer: str, shape: Shape) -> Floats:
    if isinstance(value, str):
        return _from_base64(value, pointer, shape)
    _check_array(value, pointer, shape)
    with np.errstate(over="ignore"):
        array = np.array(value, np.float64).astype(np.float32)
    _refuse_non_finite(array, pointer)
    return array


def _check_array(value: Any, pointer: str, shape: Shape) -> None:
    if not shape:
        if type(value) not in (int, float):
            raise Invalid("want a number", pointer=pointer)
        return
    if not isinstance(value, list) or len(value) != shape[0]:
        size = f" of {len(value)}" if isinstance(value, list) else ""
        raise Invalid(f"want a list of {shape[0]}, not {type(value).__name__}{size}", pointer=pointer)
    for at, item in enumerate(value):
        _check_array(item, f"{pointer}/{at}", shape[1:])


def _from_base64(value: str, pointer: str, shape: Shape) -> Floats:
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid(
            "want numbers, or the base64 of their float32 bytes; text goes into `text` or `texts`", pointer=pointer
        ) from error
    if len(data) != 4 * math.prod(shape):
        raise Invalid(f"base64 of {len(data)} bytes, want {4 * math.prod(shape)}", pointer=pointer)
    array = np.frombuffer(data, FLOAT32).reshape(shape)
    _refuse_non_finite(array, pointer)
    return array


def _refuse_non_finite(array: Floats, pointer: str) -> None:
    size = np.abs(array)
    if not size.max() <= LARGEST:  # also where it is NaN
        where = np.unravel_index(int(np.argmin(size <= LARGEST)), array.shape)
        raise Invalid(f"not a finite float32 within {LARGEST:.0e}", pointer=pointer + "".join(f"/{at}" for at in where))


def _escaped(name: str) -> str:
    return _plain_text(name[:100]).replace("~", "~0").replace("/", "~1")


def _plain_text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()  # JSON can escape half a character
