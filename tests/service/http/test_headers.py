"""The grammar of field values and request targets."""

from __future__ import annotations

import math
from time import process_time

import pytest

from service.http.headers import (
    MediaType,
    chosen,
    combine,
    decimal,
    elements,
    has_tag,
    is_host,
    media_type,
    origin_form,
    path_of,
    quality,
    tokens,
)

OCTETS, JSON = b"application/octet-stream", b"application/json"


@pytest.mark.parametrize(
    ("value", "parameters"),
    [
        (b"application/octet-stream", ()),
        (b" Application/OCTET-Stream ; DType=float16", ((b"dtype", b"float16"),)),
        (b'application/octet-stream;dtype="float16";shape="2,5"', ((b"dtype", b"float16"), (b"shape", b"2,5"))),
        (rb'application/octet-stream;x="a\"b;c=d"', ((b"x", b'a"b;c=d'),)),
        (b"application/octet-stream; ; shape=2,5 ;", ((b"shape", b"2,5"),)),
        (b"application/octet-stream;a=;a=2", ((b"a", b""), (b"a", b"2"))),
    ],
)
def test_a_media_type_is_read_with_its_parameters(value: bytes, parameters: tuple[tuple[bytes, bytes], ...]) -> None:
    assert media_type(value) == MediaType(OCTETS, parameters)


@pytest.mark.parametrize(
    "value", [b"", b"json", b"a/b, a/b", b"a/b;c", b"a/b;c=1, d/e", b'a/b;c="', b"a/b c/d", b"a/", b"a/b;c = d"]
)
def test_a_malformed_media_type_is_none(value: bytes) -> None:
    assert media_type(value) is None


def test_lists_are_split_outside_quotes_only() -> None:
    assert elements(b'a, "b,c" ,, d;x="\\",",e') == [b"a", b'"b,c"', b'd;x="\\","', b"e"]
    assert tokens(b"Foo, CLOSE,") == {b"foo", b"close"}
    assert elements(b" , ") == []


def test_repeated_fields_are_one_list() -> None:
    assert combine([(b"accept", b"a/b"), (b"x", b"1"), (b"accept", b"c/d")]) == {b"accept": b"a/b, c/d", b"x": b"1"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"application/json;q=0.3, application/*;q=0.2, */*;q=0.1", 0.3),
        (b"application/*;q=0.2, */*;q=0.9", 0.2),
        (b"*/*;q=0.9, text/html", 0.9),
        (b"application/json;q=0, */*", 0.0),
        (b"text/html", 0.0),
        (b"application/json;q=2", 0.0),
        (b"application/json; Q=1.000", 1.0),
    ],
)
def test_the_most_specific_range_decides_the_quality(value: bytes, expected: float) -> None:
    assert quality(value, JSON) == expected
    assert quality(value, JSON) == expected, "what is remembered differs"


@pytest.mark.parametrize(
    ("value", "is_chosen"),
    [
        (b"application/octet-stream", True),
        (b"APPLICATION/octet-stream;q=0.5, */*;q=0.1", True),
        (b"application/json, application/octet-stream", True),
        (b"application/octet-stream;q=0.5, application/json", False),
        (b"application/octet-stream;q=0", False),
        (b"*/*", False),
        (b"application/*", False),
        (b'text/plain;x="application/octet-stream"', False),
        (b"application/octet-streams", False),
        (b"", False),
    ],
)
def test_a_media_type_is_chosen_if_it_is_named_and_preferred(value: bytes, is_chosen: bool) -> None:
    assert (chosen(value, OCTETS, JSON) is not None) is is_chosen


@pytest.mark.parametrize("value", [b'"x"', b'W/"x"', b'"a", W/"x"', b" * ", b'"a,b","x"'])
def test_entity_tags_are_compared_weakly(value: bytes) -> None:
    assert has_tag(value, b'"x"')


@pytest.mark.parametrize("value", [b"", b"x", b'"xx"', b'"*"', b'"a"x"'])
def test_other_entity_tags_are_not_the_same(value: bytes) -> None:
    assert not has_tag(value, b'"x"')


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/predict", "/predict"),
        (b"/%70redict", "/predict"),
        (b"/a%2fb%2Fc", "/a%2Fb%2Fc"),
        (b"/%C3%A9", "/é"),
        (b"/%ff%zz%", "/\ufffd%zz%"),
    ],
)
def test_a_path_is_decoded_but_for_its_slashes(target: bytes, path: str) -> None:
    assert path_of(target) == path


@pytest.mark.parametrize(
    ("target", "origin"),
    [
        (b"http://h:80/p?q", b"/p?q"),
        (b"HTTPS://h", b"/"),
        (b"http://h?q", b"/?q"),
        (b"/http://h/p", b"/http://h/p"),
        (b"*", b"*"),
    ],
)
def test_an_absolute_target_is_brought_into_origin_form(target: bytes, origin: bytes) -> None:
    assert origin_form(target) == origin


@pytest.mark.parametrize("value", [b"", b"h", b"h:80", b"h:", b"127.0.0.1:8000", b"[::1]:80", b"a_b.c-d"])
def test_a_host_is_a_name_or_an_address(value: bytes) -> None:
    assert is_host(value)


@pytest.mark.parametrize("value", [b"a b", b"a, a", b"a/b", b"u@h", b"h:x", b"[::1", b"h?q"])
def test_other_hosts_are_none(value: bytes) -> None:
    assert not is_host(value)


def test_numbers_are_decimal() -> None:
    assert [decimal(value) for value in (b"5", b" 0.5 ", b"1e3")] == [5, 0.5, 1000]
    assert all(math.isnan(decimal(value)) for value in (b"", b"1_0", b"+5", b"-1", b"inf", b"nan", b"0x1", b"5, 5"))


@pytest.mark.parametrize(
    "value", [b'"' * 15_000, b'"\\' * 8000, b"a/b," * 4000, b"a/b" + b' ;a="' * 3000, b" ;" * 8000]
)
def test_long_values_take_time_in_proportion(value: bytes) -> None:
    """If they took time in proportion to the square of their length, this would take seconds of processor time."""
    began = process_time()
    for parse in (elements, media_type, tokens):
        parse(value)
    quality(value, JSON)
    has_tag(value, b'"x"')
    assert process_time() - began < 0.5
