"""Arguments of a call to the requests that are sent."""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, SupportsIndex

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lvm.transport import MAX_TIMEOUT_S

Floats = NDArray[np.float32]
# for `article` or a metadata field, the values of which a passage must have one
Filter = Mapping[str, str | float | bool | Iterable[str | float | bool]]
# one text, which the service cuts into chunks, or ready chunks
Text = str | Sequence[str]
Ids = Iterable[SupportsIndex]
Profile = Literal["realtime", "batch"]
ReadAs = Literal["query"]
OCTETS = "application/octet-stream"
JSON = "application/json"
# time after the deadline in which the service can respond that the deadline passed
GRACE_S = 0.25
# of options in a query string; the service accepts 16 KiB of headers
MAX_QUERY_CHARACTERS = 4_000
# of all queries of a request: hits, and ids to exclude
MAX_FOUND = 50_000
# of texts to embed, for each row that a request may have
CHARACTERS_PER_ROW = 1_000
# of all texts of a request to /retrieve
MAX_TEXT = 50_000


class HttpRequest(NamedTuple):
    """A request, with the names of httpx for its parts; `timeout` is in seconds, or inf."""

    method: str
    url: str
    content: bytes = b""
    headers: Mapping[str, str] = {}
    params: Mapping[str, str] = {}
    timeout: float = math.inf

    @property
    def limit(self) -> float | None:
        """Seconds, or None if there is no limit."""
        return finite(self.timeout)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx; connecting times out early enough to be reported as such."""
        connect = self.limit and self.limit - GRACE_S
        return {**self._asdict(), "timeout": httpx.Timeout(self.limit, connect=connect)}


def finite(seconds: float) -> float | None:
    """Return seconds, or None if they are no limit."""
    return seconds if seconds < MAX_TIMEOUT_S else None


def predict_request(rows: NDArray[Any], options: Mapping[str, Any]) -> HttpRequest:
    """Return a request for the next vectors of contexts, in octets both ways."""
    headers = {**_octet_headers(rows), "accept": OCTETS}
    return HttpRequest("POST", "/predict", _float32(rows), headers, _params(options))


def retrieve_request(field: str, rows: NDArray[Any], options: Mapping[str, Any]) -> HttpRequest:
    """Return a request for passages, in octets if their shape says which `field` of JSON they are."""
    params = _params(options)
    is_ambiguous = field == "contexts" and rows.shape[1] == 1
    if sum(map(len, params.values())) <= MAX_QUERY_CHARACTERS and not is_ambiguous:
        sent = rows[:, None] if field == "queries" else rows
        return HttpRequest("POST", "/retrieve", _float32(rows), _octet_headers(sent), params)
    is_one = field in ("query", "context")
    return json_request("/retrieve", {field: _base64(rows) if is_one else list(map(_base64, rows)), **options})


def json_request(url: str, body: Mapping[str, Any]) -> HttpRequest:
    """Return a POST of JSON in UTF-8; raises `ValueError` if a string of it has no UTF-8."""
    content = json.dumps(body, ensure_ascii=False).encode()
    return HttpRequest("POST", url, content, {"content-type": JSON})


def text_of(given: Any) -> str | list[str] | None:
    """Return an argument as a string, or a list of strings that is not empty; None if it is neither."""
    if isinstance(given, np.ndarray) and given.dtype.kind in "UO":
        given = given.tolist()
    if isinstance(given, str):
        return given
    is_list = isinstance(given, list | tuple) and len(given) > 0
    return list(given) if is_list and all(isinstance(item, str) for item in given) else None


def texts_of(given: Any) -> list[str | list[str]] | None:
    """Return an argument as a list of texts, each of which `text_of` returns; None if it is not a list of these."""
    items = given.tolist() if isinstance(given, np.ndarray) and given.dtype.kind in "UO" else given
    texts = [text_of(item) for item in items] if isinstance(items, list | tuple) and items else [None]
    return None if None in texts else [text for text in texts if text is not None]


def text_field(text: str | list[str]) -> dict[str, Any]:
    """Return the field of a body that holds a text, or ready chunks."""
    return {"text" if isinstance(text, str) else "texts": text}


def to_numbers(given: ArrayLike, what: str, shapes: Mapping[int, str]) -> NDArray[Any]:
    """Return an array, not copied if it is one; raises `ValueError` if it has no numbers or a wrong rank."""
    try:
        array = np.asarray(given)
    except Exception as error:
        raise ValueError(f"{what}: expected an array of numbers, got {type(given).__name__}: {error}") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{what}: expected an array of numbers, got one of {array.dtype}")
    if array.ndim not in shapes or 0 in array.shape[-2:]:
        raise ValueError(f"{what}: shape is {array.shape}; expected {' or '.join(shapes.values())}")
    return array


def queries_of_a_part(options: Mapping[str, Any], most: int) -> int:
    """Return how many queries one request has; the service bounds their hits and exclusions together."""
    k, exclude = options.get("k", 10), options.get("exclude", ())
    if not isinstance(k, int) or not isinstance(exclude, list | tuple) or k < 1:
        return most
    return max(1, min(most, MAX_FOUND // (k + len(exclude))))


def parts_of_texts(texts: Sequence[str], most: int, characters: int) -> list[list[str]]:
    """Return texts in parts of at most `most`, with at most so many `characters` if a part has more than one."""
    parts: list[list[str]] = [[]]
    left = characters
    for text in texts:
        if parts[-1] and (len(parts[-1]) == most or len(text) > left):
            parts.append([])
            left = characters
        parts[-1].append(text)
        left -= len(text)
    return parts


def to_json_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON values, without None; raises `ValueError` if one cannot be sent."""
    return {name: _to_json(name, value) for name, value in options.items() if value is not None}


def parse_timeout(timeout: float | None) -> float:
    """Return seconds, or inf for None; raises `ValueError` if they are not more than 0."""
    try:
        seconds = math.inf if timeout is None else float(timeout)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("timeout: expected seconds, or None for no limit") from error
    if not seconds > 0:
        raise ValueError(f"timeout: expected more than 0 seconds, or None for no limit; got {seconds:g}")
    return seconds if seconds < MAX_TIMEOUT_S else math.inf


def parse_count(name: str, number: Any, least: int) -> int:
    """Return an integer; raises `ValueError` if the value is not an integer, or is less than `least`."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}")
    return int(number)


def parse_url(url: str) -> httpx.URL:
    """Return the address of the service; raises `ValueError` if it is not an HTTP URL, or has a query."""
    try:
        base = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise ValueError(f"not a URL: {error}") from error
    is_plain = base.scheme in ("http", "https") and base.host and not base.query and not base.fragment
    if not is_plain or not 0 < (base.port or 80) < 65_536:
        raise ValueError("expected a URL such as http://127.0.0.1:8000, without query and fragment")
    return base


def without_password(url: httpx.URL) -> httpx.URL:
    """Return a URL as an error message may show it."""
    return url.copy_with(userinfo=b"")


def trace_headers(traceparent: str | None) -> dict[str, str]:
    """Return the headers of a trace: `traceparent`, or the current trace of OpenTelemetry, if any."""
    if traceparent is not None:
        return {"traceparent": str(traceparent)}
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(headers)
    return headers


def auth_headers(token: str | None) -> dict[str, str]:
    """Return the Authorization header of a token."""
    return {"authorization": f"Bearer {token}"} if token else {}


def _float32(rows: NDArray[Any]) -> bytes:
    """Return little-endian float32; a value that is too large becomes infinite, which the service points at."""
    with np.errstate(over="ignore"):
        return rows.astype("<f4", copy=False).tobytes()


def _octet_headers(rows: NDArray[Any]) -> dict[str, str]:
    return {"content-type": f"{OCTETS}; dtype=float32; shape={'x'.join(map(str, rows.shape))}"}


def _base64(rows: NDArray[Any]) -> str:
    return base64.b64encode(_float32(rows)).decode()


def _params(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}


def _to_json(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_json(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [_to_json(name, item) for item in value]
    raise ValueError(f"{name}: expected a string, a number, a boolean or a list of them, got {_kind(value)}")


def _kind(value: Any) -> str:
    return type(value).__name__
