"""The wire: two readers of JSON that agree, and binary held to the same rules."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lvm.errors import (
    Invalid,
    Malformed,
    ServiceError,
    TooLarge,
    UnsupportedMediaType,
)
from service.http import checks, codec
from service.http.codec import (
    NOTHING,
    ArrayReader,
    Decoded,
    Fields,
    JsonReader,
    run_to_end,
)
from service.http.json_slices import PART, LongArray
from service.http.octets import (
    decode_octets,
    encode_base64,
    octet_type,
)
from tests.fakes import Shaped

OPTIONS = {
    "model": checks.text,
    "k": checks.whole(1, 9),
    "own": checks.flag,
    "filter": checks.search_filter,
    "exclude": checks.wholes(9),
    "mmr": checks.share,
}
FIELDS = Fields({"context": 0, "contexts": 1}, OPTIONS)
SHAPE = (2, 3)


def resolve(field: str, options: dict[str, Any]) -> Shaped:
    return Shaped(SHAPE)


def fast(body: bytes) -> Decoded[Shaped] | None:
    return JsonReader(FIELDS, 3).read_fast(body, resolve)


def strict(body: bytes) -> Decoded[Shaped]:
    return JsonReader(FIELDS, 3).read_strictly(body, resolve)


def decode_json(body: bytes) -> Decoded[Shaped]:
    return read(JsonReader(FIELDS, 3), body)


def read(reader: JsonReader, body: bytes, query: Mapping[str, Any] = NOTHING) -> Decoded[Shaped]:
    return reader.read_at_once(body, resolve, query) or run_to_end(reader.read_in_slices(body, resolve, query))


floats = st.floats(-(2**29), 2**29, width=32) | st.integers(-(2**29), 2**29)
context = st.lists(st.lists(floats, min_size=3, max_size=3), min_size=2, max_size=2)
plain = {"model": st.just("amn"), "k": st.integers(1, 9), "own": st.booleans(), "mmr": st.floats(0, 1)}
options = st.fixed_dictionaries({}, optional=plain)
value = st.integers(-(2**63), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.text()
wanted = st.dictionaries(st.text(max_size=5) | st.sampled_from(["context", "contexts"]), value | st.lists(value))
nested = st.fixed_dictionaries({}, optional={**plain, "filter": wanted, "exclude": st.lists(st.integers(0, 2**60))})


@given(options, st.one_of(context, st.lists(context, min_size=1, max_size=3)))
def test_the_fast_reader_accepts_valid_bodies_and_agrees_with_the_strict_one(
    given_options: dict[str, Any], rows: list[Any]
) -> None:
    field = "contexts" if isinstance(rows[0][0], list) else "context"
    body = json.dumps({field: rows, **given_options}).encode()
    quick, slow = fast(body), strict(body)
    assert quick is not None
    np.testing.assert_array_equal(quick.rows, slow.rows)
    assert quick.rows.dtype == slow.rows.dtype == np.float32
    assert (quick.field, quick.options) == (slow.field, slow.options)


@settings(max_examples=300)
@example({"filter": {"n": -(10**18) - 1}}, [[0.0] * 3] * 2, True)
@given(nested, st.one_of(context, st.lists(context, min_size=1, max_size=3)), st.booleans())
def test_both_readers_agree_on_lists_and_objects_in_options(
    given_options: dict[str, Any], rows: list[Any], ascii_: bool
) -> None:
    field = "contexts" if isinstance(rows[0][0], list) else "context"
    body = json.dumps({field: rows, **given_options}, ensure_ascii=ascii_).encode()
    assert_alike(body)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["filter", "exclude", "k"]), st.deferred(lambda: anything), min_size=1))
def test_both_readers_agree_on_options_of_any_kind(given_options: dict[str, Any]) -> None:
    assert_alike(json.dumps({**given_options, "context": [[1, 2, 3], [4, 5, 6]]}).encode())


def assert_alike(body: bytes) -> None:
    """Check that the fast reader rejects, leaves to the strict one, or reads as that one does."""
    try:
        slow: Decoded | None = strict(body)
    except ServiceError:
        slow = None
    try:
        quick = fast(body)
    except (ServiceError, *codec.NOT_PROVED):
        quick = None
    if quick is not None:
        assert slow is not None
        np.testing.assert_array_equal(quick.rows, slow.rows)
        assert repr((quick.field, quick.options)) == repr((slow.field, slow.options))


@pytest.mark.parametrize("more", ['"filter": {"a": [1, 2], "b": "["}', '"exclude": [1, 2]', '"filter": {}'])
def test_the_fast_reader_accepts_lists_and_objects_in_options(more: str) -> None:
    quick = fast(f'{{"context": [[1, 2, 3], [4, 5, 6]], {more}}}'.encode())
    assert quick is not None
    assert quick.rows.shape == (1, 2, 3)


@pytest.mark.parametrize(
    "body",
    [
        '{"context": [[1, 2, [3]], [4, 5, 6]], "filter": {"a": "\\u005b"}}',
        '{"context": [[1, 2, [3]], [4, 5, 6]], "filter": {"a": [1]}}',
        '{"context": [[1, 2, 3], [4, 5, 6]], "filter": {"a": 1, "a": 2}}',
        '{"context": [[1, 2, 3], [4, 5, 6]], "filter": {"a": [[1]]}}',
        '{"context": [[1, 2, 3], [4, 5, 6]], "filter": {"a": {"b": 1}}}',
        '{"context": [[1, 2, 3], [4, 5, 6]], "filter": {"a": null}}',
        '{"context": [[1, 2, 3], [4, 5, 6]], "filter": {"a": NaN}}',
        '{"context": [[1, 2, 3], [4, 5, 6]], "mmr": NaN}',
    ],
)
def test_rejects_what_only_looks_right_beside_options(body: str) -> None:
    with pytest.raises(ServiceError):
        decode_json(body.encode())


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("[["),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["context", "k", "x"]), inner, max_size=2)
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@given(st.sampled_from(["context", "contexts"]), anything)
def test_both_readers_accept_the_same_bodies(field: str, value: Any) -> None:
    body = json.dumps({field: value}).encode()
    try:
        slow: Decoded | None = strict(body)
    except ServiceError:
        slow = None
    try:
        quick = fast(body)
    except (ServiceError, ValueError, TypeError, KeyError, RuntimeError):
        quick = None
    if quick is not None:
        assert slow is not None
        np.testing.assert_array_equal(quick.rows, slow.rows)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_give_rows_or_a_service_error(body: bytes) -> None:
    for call in (lambda: decode_json(body), lambda: decode_octets(body, SHAPE, 3)):
        with contextlib.suppress(ServiceError):
            call()


def test_rejects_a_number_in_brackets_of_its_own() -> None:
    body = b'{"context": [[1, 2, [3]], [4, 5, 6]]}'
    assert fast(body) is None
    with pytest.raises(Invalid) as refusal:
        decode_json(body)
    assert refusal.value.pointer == "/context/0/2"


@pytest.mark.parametrize("more", ['"model": null, "contexts": null', '"k": 3.0'])
def test_the_fast_reader_accepts_null_and_whole_floats(more: str) -> None:
    quick = fast(f'{{"context": [[1, 2, 3], [4, 5, 6]], {more}}}'.encode())
    assert quick is not None
    assert quick.options in ({}, {"k": 3})


def test_brackets_in_a_string_do_not_matter() -> None:
    body = b'{"context": [[1, 2, 3], [4, 5, 6]], "model": "[["}'
    assert decode_json(body).options == {"model": "[["}


@pytest.mark.parametrize("more", ["", ', "k": 3', ', "filter": {"a": [1]}'])
def test_the_fast_reader_accepts_base64(more: str) -> None:
    rows = np.arange(6, dtype="<f4").reshape(1, *SHAPE)
    body = f'{{"context": "{encode_base64(rows)}"{more}}}'.encode()
    quick, slow = fast(body), strict(body)
    assert quick is not None
    np.testing.assert_array_equal(quick.rows, rows)
    assert repr(quick) == repr(slow)


def test_rejects_encodings_other_than_utf8() -> None:
    for encoding in ("utf-16", "utf-32"):
        with pytest.raises(Malformed):
            decode_json('{"context": [[1, 2, 3], [4, 5, 6]]}'.encode(encoding))


def test_rejects_too_many_rows() -> None:
    rows = [[[0.0] * 3] * 2] * 4
    with pytest.raises(TooLarge):
        decode_json(json.dumps({"contexts": rows}).encode())
    with pytest.raises(TooLarge):
        decode_octets(b"\0" * 24 * 4, SHAPE, 3)


def test_octets_are_not_copied() -> None:
    body = np.arange(12, dtype="<f4").tobytes()
    rows = decode_octets(body, SHAPE, 3)
    np.testing.assert_array_equal(rows.ravel(), np.arange(12))
    assert np.shares_memory(rows, np.frombuffer(body, "<f4"))


@pytest.mark.parametrize(
    ("header", "dtype", "shape"),
    [
        (b"application/octet-stream", "float32", None),
        (b"application/octet-stream; dtype=float16", "float16", None),
        (b"application/octet-stream;shape=2x5x384", "float32", (2, 5, 384)),
        (b'Application/Octet-Stream ; Shape="2,5,384" ; DType="Float16"', "float16", (2, 5, 384)),
        (b'application/octet-stream; shape="2, 5, 384"; dtype=float32', "float32", (2, 5, 384)),
        (b"application/octet-stream; shape=2,5,384; dtype=float16", "float16", (2, 5, 384)),
        (b'application/octet-stream; name="a;shape=1;b"; charset=binary', "float32", None),
        (b'application/octet-stream; name="a\\";shape=1"; shape=384', "float32", (384,)),
        (b'application/octet-stream; shape="5\\x384"', "float32", (5, 384)),
    ],
)
def test_a_media_type_tells_dtype_and_shape(header: bytes, dtype: str, shape: tuple[int, ...] | None) -> None:
    assert octet_type(header) == (np.dtype(dtype), shape)


@pytest.mark.parametrize(
    "shape", ["", '""', "x", "2x", "2xx3", "-1x5", "0x5x384", "1.0x2", "1e3", "[2]", "\u00b2", "9" * 5000, "2;shape=2"]
)
def test_rejects_a_malformed_shape(shape: str) -> None:
    with pytest.raises(Invalid, match="shape"):
        octet_type(f"application/octet-stream; shape={shape}".encode("latin-1"))


@pytest.mark.parametrize("dtype", ["", "int4", "float64", ">f4", "float16;dtype=float32"])
def test_rejects_an_unsupported_dtype(dtype: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="float32 or float16"):
        octet_type(f"application/octet-stream; dtype={dtype}".encode())


def test_json_of_float32_reads_back_exactly() -> None:
    vector = np.random.default_rng(0).standard_normal(384).astype(np.float32)
    text = codec.encode_json({"vector": vector})
    np.testing.assert_array_equal(np.asarray(json.loads(text)["vector"], np.float32), vector)


@pytest.mark.parametrize("body", [b'{"context": [[1, 2, 3], [4, 5, 6]]%s}' % more for more in (b"", b', "k": null')])
def test_options_of_the_query_string_are_added_to_those_of_the_body(body: bytes) -> None:
    reader = JsonReader(FIELDS, 3)
    assert read(reader, body, {"k": 3}).options == {"k": 3}
    with pytest.raises(Invalid) as refusal:
        read(reader, body.replace(b"null", b"4").replace(b"]]}", b']], "k": 4}'), {"k": 3})
    assert refusal.value.pointer == "/k"


@pytest.mark.parametrize(
    ("given_", "read"), [({"k": "3"}, {"k": 3}), ({"own": "false"}, {"own": False}), ({"model": "a"}, {"model": "a"})]
)
def test_query_options_pass_the_same_checks(given_: dict[str, str], read: dict[str, Any]) -> None:
    assert checks.query_options(given_, FIELDS.options) == read


@pytest.mark.parametrize("given_", [{"k": "0"}, {"k": "x"}, {"own": "yes"}, {"what": "1"}])
def test_rejects_invalid_query_options(given_: dict[str, str]) -> None:
    with pytest.raises(Invalid):
        checks.query_options(given_, FIELDS.options)


def test_a_reader_works_on_after_an_error() -> None:
    reader = JsonReader(FIELDS, 3)
    good = b'{"context": [[1, 2, 3], [4, 5, 6]]}'
    for bad in (b"{", b'{"context": [[true, 2, 3], [4, 5, 6]]}', b'{"context": [[1, 2, 3], [4, 5, 6]], "k": 0}'):
        refusals = []
        with pytest.raises(ServiceError) as refusal:
            read(reader, bad)
        refusals.append(refusal.value)
        assert read(reader, good).rows.shape == (1, 2, 3)


@pytest.mark.parametrize("value", ["1e20", "-3e38", "1.1e9"])
def test_rejects_numbers_whose_square_overflows(value: str) -> None:
    with pytest.raises(Invalid) as refusal:
        decode_json(b'{"context": [[1, 2, 3], [4, %s, 6]]}' % value.encode())
    assert refusal.value.pointer == "/context/1/1"
    octets = np.array([1, 2, 3, 4, float(value), 6], "<f4").tobytes()
    with pytest.raises(Invalid):
        decode_octets(octets, SHAPE, 3)


def test_accepts_numbers_up_to_the_largest() -> None:
    rows = np.full((1, *SHAPE), 1e9, np.float32)
    for read_rows in (
        fast(json.dumps({"contexts": rows.tolist()}).encode()).rows,
        decode_octets(rows.tobytes(), SHAPE, 3),
    ):  # type: ignore[union-attr]
        np.testing.assert_array_equal(read_rows, rows)


def test_rejects_numbers_that_are_not_finite_in_float32() -> None:
    with pytest.raises(Invalid) as refusal:
        decode_json(b'{"context": [[1, 2, 3], [4, 1e300, 6]]}')
    assert refusal.value.pointer == "/context/1/1"


def test_replaces_a_lone_surrogate_in_a_pointer() -> None:
    with pytest.raises(Invalid) as refusal:
        decode_json(b'{"\\ud800": 1}')
    assert refusal.value.pointer == "/?"
    with pytest.raises(Invalid):
        decode_json(b'{"context": [[1, 2, 3], [4, 5, 6]], "model": "\\ud800"}')


WIDE = (4, 64)
ROWS = 500
LONG = Fields(
    {"contexts": 1, "context": 0}, {"k": checks.whole(1, 9), "model": checks.text}, {"text": checks.passage(9)}
)


def slices_of(body: bytes) -> tuple[Decoded[Shaped], int]:
    """Return what a body says, read as it is where others wait, and in how many slices."""
    reader, count = JsonReader(LONG, ROWS), 1
    at_once = reader.read_at_once(body, lambda field, options: Shaped(WIDE))
    if at_once is not None:
        return at_once, count
    work = reader.read_in_slices(body, lambda field, options: Shaped(WIDE))
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value, count
        count += 1


def numbers(rows: int = ROWS) -> Any:
    return np.random.default_rng(0).standard_normal((rows, *WIDE)).astype(np.float32)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("before", [True, False])
def test_a_long_body_is_read_in_slices_as_a_short_one_is_read(indent: int | None, before: bool) -> None:
    options, rows = {"k": 3, "model": 'a"]],['}, {"contexts": numbers().tolist()}
    body = json.dumps({**options, **rows} if before else {**rows, **options}, indent=indent).encode()
    found, count = slices_of(body)
    np.testing.assert_array_equal(found.rows, numbers())
    assert (found.field, found.options) == ("contexts", options)
    assert count >= len(body) / 2**17


def test_long_base64_is_read_in_slices() -> None:
    text = [encode_base64(row) for row in numbers()]
    found, count = slices_of(json.dumps({"contexts": text, "k": 1}).encode())
    np.testing.assert_array_equal(found.rows, numbers())
    assert count > 4


def test_a_long_list_in_an_option_is_not_taken_for_vectors() -> None:
    """Although it follows the name of a field."""
    fields = Fields({"contexts": 1, "context": 0}, {"filter": checks.search_filter})
    reader = JsonReader(fields, ROWS)
    shape = Shaped((1, 3))
    names = [f"{'x' * 90}{number}" for number in range(1000)]
    vectors = {"context": [[1, 2, 3]]}
    for body, is_valid in (
        ({"filter": {"contexts": names}, **vectors}, True),
        ({"filter": {"contexts": numbers(100).tolist()}, "contexts": []}, False),
    ):
        work = reader.read_in_slices(json.dumps(body).encode(), lambda field, options: shape)
        try:
            found = run_to_end(work)
        except Invalid:
            assert not is_valid
        else:
            assert is_valid
            assert (found.rows.shape, found.options) == ((1, 1, 3), {"filter": {"contexts": names}})


@pytest.mark.parametrize("value", [None, True, "1", [1], 1e40])
@pytest.mark.parametrize("at", [0, ROWS - 2])
def test_points_at_a_fault_far_into_a_long_body(at: int, value: Any) -> None:
    rows = numbers().tolist()
    rows[at][3][63] = value
    with pytest.raises(Invalid) as refusal:
        slices_of(json.dumps({"contexts": rows}).encode())
    assert refusal.value.pointer == f"/contexts/{at}/3/63"


@pytest.mark.parametrize(
    ("good", "bad"),
    [(b"]]]", b"]],]"), (b"]]]", b"]]]]"), (b"[[[", b"[[[["), (b"]],", b"]],,"), (b", ", b" "), (b"]]]}", b"]]]")],
)
@pytest.mark.parametrize("last", [True, False])
def test_rejects_a_long_body_that_is_not_json(good: bytes, bad: bytes, last: bool) -> None:
    body = json.dumps({"contexts": numbers().tolist()}).encode()
    at = body.rindex(good) if last else body.index(good)
    with pytest.raises((Malformed, Invalid)):
        slices_of(body[:at] + bad + body[at + len(good) :])


def test_rejects_a_part_without_items() -> None:
    item = b" " * 500 + b"[[1,2,3]]"
    items = b",".join([item] * (PART // len(item) + 1))
    for text, is_valid in ((b"[%b,%b]" % (items, item), True), (b"[%b, ]" % items, False)):
        work = ArrayReader().read(LongArray(text, 0, len(text)), (1, 3), "/contexts", ROWS, TooLarge)
        if is_valid:
            assert run_to_end(work).shape[1:] == (1, 3)
        else:
            with pytest.raises(Invalid, match="trailing comma"):
                run_to_end(work)


def test_rejects_a_long_body_with_too_many_rows() -> None:
    with pytest.raises(TooLarge):
        slices_of(json.dumps({"contexts": numbers(ROWS + 1).tolist()}).encode())


HEAVY = {
    "names": b'{"contexts": [[[1]]]' + b"".join(b',"k%d":0' % n for n in range(60_000)) + b"}",
    "names of one letter": b"{" + b'"k":0,' * 200_000 + b'"k":0}',
    "empty lists": b'{"contexts":[' + b"[]," * 400_000 + b"[]]}",
    "flat numbers": b'{"contexts":[' + b"0," * 400_000 + b"0]}",
    "short rows": b'{"contexts":[' + b"[[1]]," * 200_000 + b"[[1]]]}",
    "objects": b'{"context":[' + b'{"a":0},' * 150_000 + b"0]}",
    "brackets": b'{"contexts":' + b"[" * 1_000_000 + b"}",
    "closing brackets": b'{"contexts":[[[0' + b"]" * 1_000_000 + b"}",
    "digits": b'{"contexts":[[[' + b"1" * 1_000_000 + b"]]]}",
    "white space": b'{"contexts":[[[0' + b" " * 1_000_000 + b"]]]}",
    "one name": b'{"' + b"a" * 5_000_000 + b'":0}',
    "one string": b'{"context":"' + b"a" * 5_000_000 + b'"}',
    "escapes": b'{"context":"' + b"\\u0061" * 500_000 + b'"}',
    "texts": b'{"text":[' + b'"a",' * 200_000 + b'"a"]}',
    "another field": b'{"k":{"contexts":[' + b"[[1]]," * 200_000 + b"[[1]]]}}",
}


@pytest.mark.parametrize("name", HEAVY)
def test_rejects_an_expensive_body_early(name: str, made: list[int]) -> None:
    with pytest.raises((Invalid, Malformed)):
        slices_of(HEAVY[name])
    assert sum(made) < 70_000


@pytest.fixture
def made() -> Iterator[list[int]]:
    """Count the objects that Python makes room for and a collection would have to look at."""
    before, counts = gc.get_threshold(), [0]

    def look(phase: str, info: dict[str, int]) -> None:
        counts.append(1000 if phase == "start" else 0)

    gc.callbacks.append(look)
    gc.set_threshold(1000, 10_000, 10_000)
    yield counts
    gc.set_threshold(*before)
    gc.callbacks.remove(look)
