"""The grammar of HTTP: field values (RFC 9110, section 5.6) and request targets (RFC 9112, section 3.2).

Values that repeat from request to request are parsed once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import unquote_to_bytes

TOKEN = rb"[!#$%&'*+.^_`|~\w-]+"
QUOTED = rb'"(?:[^"\\]|\\.)*"'
ELEMENT = re.compile(rb'(?:[^,"]|"(?:[^"\\]|\\.?)*+"?)+', re.DOTALL)
DECIMAL = re.compile(rb"\d+(?:\.\d*)?(?:e[+-]?\d+)?", re.IGNORECASE)
OPENMETRICS, PLAIN = b"application/openmetrics-text", b"text/plain"
VERSION = re.compile(rb"\d{1,4}(\.\d{1,4}){0,2}")
MEDIA_TYPE = re.compile(rb"(%b/%b)((?:[ \t]*;.*)?)" % (TOKEN, TOKEN), re.DOTALL)
PARAMETER = re.compile(rb'[ \t]*;[ \t]*(?:(%b)=(%b|[^;"/]*))?' % (TOKEN, QUOTED), re.DOTALL)
ENTITY_TAG = re.compile(rb'(?:W/)?("[^"]*")')
QUALITY = re.compile(rb"0(?:\.\d{0,3})?|1(?:\.0{0,3})?")
ORIGIN = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)
HOST = re.compile(rb"(?:\[[\da-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(?::\d*)?", re.IGNORECASE)
SLASH = re.compile(rb"%2f", re.IGNORECASE)
MOST_CACHED = 256  # values of each kind
LONGEST_CACHED = 200  # bytes; what parses into thousands of elements is not kept

P = ParamSpec("P")
R = TypeVar("R")
Parse = Callable[Concatenate[bytes, P], R]


class MediaType(NamedTuple):
    """A media type in lower case, and its parameters in their order, their names in lower case."""

    name: bytes
    parameters: tuple[tuple[bytes, bytes], ...]

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of a parameter; several if it is repeated."""
        return [value for known, value in self.parameters if known == name]


class Accepted(NamedTuple):
    """One element of an Accept header: a media type or range, and its quality from 0 to 1."""

    media_type: MediaType
    quality: float


def cached(parse: Parse[P, R]) -> Parse[P, R]:
    """Return `parse` with its last results for short values kept."""
    remembered = lru_cache(MOST_CACHED)(parse)

    @wraps(parse)
    def call(value: bytes, /, *args: P.args, **options: P.kwargs) -> R:
        return (remembered if len(value) <= LONGEST_CACHED else parse)(value, *args, **options)

    return call


def combine(fields: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return the values by name; a repeated field is one list, which a field of a single value does not allow."""
    combined: dict[bytes, bytes] = {}
    for name, value in fields:
        combined[name] = value if name not in combined else combined[name] + b", " + value
    return combined


def elements(value: bytes) -> list[bytes]:
    """Return the elements of a list; commas in quoted strings separate nothing, empty elements are left out."""
    stripped = (element.strip() for element in ELEMENT.findall(value))
    return [element for element in stripped if element]


@cached
def tokens(value: bytes) -> frozenset[bytes]:
    """Return the elements of a list of tokens, in lower case."""
    return frozenset(element.lower() for element in elements(value))


@cached
def media_type(value: bytes) -> MediaType | None:
    """Return the media type of a Content-Type, None if it is malformed.

    What follows the `=` of a parameter may be more than a token without being quoted, as callers write `a=1,2`.
    """
    match = MEDIA_TYPE.fullmatch(value.strip())
    parameters = None if match is None else _parameters(match[2])
    return None if match is None or parameters is None else MediaType(match[1].lower(), parameters)


@cached
def accepted(value: bytes) -> tuple[Accepted, ...]:
    """Return the elements of an Accept header in their order; malformed ones are left out."""
    found = []
    for element in elements(value):
        wanted = media_type(element)
        if wanted is not None:
            quality = b" ".join(wanted.values(b"q") or [b"1"])
            if QUALITY.fullmatch(quality):
                found.append(Accepted(wanted, float(quality)))
    return tuple(found)


def quality(value: bytes, name: bytes) -> float:
    """Return the quality that an Accept header gives a media type: that of the most specific range that matches."""
    ranges = (name, name.partition(b"/")[0] + b"/*", b"*/*")
    for wanted in ranges:
        found = [each.quality for each in accepted(value) if each.media_type.name == wanted]
        if found:
            return max(found)
    return 0.0


@cached
def chosen(value: bytes, name: bytes, default: bytes) -> MediaType | None:
    """Return how an Accept header names the media type `name`, None if it does not or prefers `default`."""
    named = [each for each in accepted(value) if each.media_type.name == name]
    best = max(named, key=lambda each: each.quality, default=None)
    if best is None or not best.quality or best.quality < quality(value, default):
        return None
    return best.media_type


@lru_cache(MOST_CACHED)
def is_host(value: bytes) -> bool:
    """Return whether a Host header names one host: a name or an address, and a port."""
    return HOST.fullmatch(value) is not None


def decimal(value: bytes) -> float:
    """Return a number that is not negative, or NaN if the value is not one."""
    return float(value) if DECIMAL.fullmatch(value.strip()) else math.nan


def has_tag(value: bytes, tag: bytes) -> bool:
    """Return whether an If-None-Match names the entity tag `tag`, by weak comparison."""
    return value.strip() == b"*" or tag in ENTITY_TAG.findall(value)


def path_of(target: bytes) -> str:
    """Return the path of a request target without percent-encoding, but for `%2F`: that is no slash."""
    if b"%" not in target:
        return target.decode("ascii", "replace")
    return b"%2F".join(map(unquote_to_bytes, SLASH.split(target))).decode("utf-8", "replace")


def origin_form(target: bytes) -> bytes:
    """Return a request target as path and query, without the scheme and host of an absolute one."""
    path = ORIGIN.sub(b"", target, count=1) if ORIGIN.match(target) else target
    return path if path.startswith((b"/", b"*")) else b"/" + path


def _parameters(text: bytes) -> tuple[tuple[bytes, bytes], ...] | None:
    found = []
    at = 0
    while at < len(text):
        match = PARAMETER.match(text, at)
        if match is None:
            return None
        at = match.end()
        if match[1]:
            found.append((match[1].lower(), _unquoted(match[2].strip())))
    return tuple(found)


def _unquoted(value: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", value[1:-1], flags=re.DOTALL) if value.startswith(b'"') else value


def exposition_format(accept: str) -> str:
    """Return the format that an Accept header prefers, as `choose_encoder` reads it: no qualities, no quotes."""
    value = accept.encode("latin-1", "replace")
    wanted = chosen(value, OPENMETRICS, PLAIN) or chosen(value, PLAIN, OPENMETRICS)
    if wanted is None:
        return ""
    known = {name: value for name, value in wanted.parameters if name in (b"version", b"escaping")}
    if not VERSION.fullmatch(known.get(b"version", b"0")):
        del known[b"version"]
    return b";".join([wanted.name, *(b"%b=%b" % parameter for parameter in known.items())]).decode("latin-1")
