"""From contexts to the bytes of requests, and the check of a response: by its shape, or against the right answer."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import numpy as np
import orjson

from loadtest.contexts import Vectors
from loadtest.plan import PlanError, Route, Wire

K = 10
PROBES = ("livez", "readyz")
_MEDIA = {"json": "application/json", "octet": "application/octet-stream"}


@dataclass(frozen=True)
class Exchange:
    """One kind of request and of its response: route, wire, contexts per request, dimension D."""

    route: Route
    wire: Wire
    rows: int
    dim: int
    query: str = ""

    @property
    def method(self) -> str:
        """POST, but GET for a probe."""
        return "GET" if self.route in PROBES else "POST"

    @property
    def path(self) -> str:
        """Path and query of the request."""
        options = [f"k={K}"] if self.route == "retrieve" and self.wire == "octet" else []
        query = "&".join(options + [self.query] * bool(self.query))
        return f"/{self.route}?{query}" if query else f"/{self.route}"

    @property
    def headers(self) -> dict[str, str]:
        """Content-Type and Accept, and the token of LVM_TOKEN."""
        answer = self.wire if self.route == "predict" else "json"
        token = os.environ.get("LVM_TOKEN")
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        return {"Content-Type": _MEDIA[self.wire], "Accept": _MEDIA[answer], **authorization}

    def media_type(self, contexts: Vectors) -> str:
        """Return the Content-Type of the bodies; octets of several contexts carry their shape."""
        media_type = self.headers["Content-Type"]
        if self.wire == "json" or self.rows == 1:
            return media_type
        return f"{media_type}; shape={self.rows}x{contexts.shape[1]}x{contexts.shape[2]}"

    def bodies(self, contexts: Vectors) -> list[bytes]:
        """Return one body per context of `(N, T, D)`; with rows > 1 each carries that context and those after it."""
        if self.route in PROBES:
            return [b""]
        pieces = [_json(one) if self.wire == "json" else one.tobytes() for one in contexts]
        groups = [[pieces[(i + j) % len(pieces)] for j in range(self.rows)] for i in range(len(pieces))]
        if self.wire == "octet":
            return [b"".join(group) for group in groups]
        more = b', "k": %d' % K if self.route == "retrieve" else b""
        if self.rows == 1:
            return [b'{"context": %b%b}' % (group[0], more) for group in groups]
        return [b'{"contexts": [%b]}' % b", ".join(group) for group in groups]

    def is_whole(self, body: bytes) -> bool:
        """Return whether the body of a 200 has the expected shape and only finite numbers."""
        if self.route in PROBES:
            return True
        if self.route == "predict" and self.wire == "octet":
            return len(body) == self.rows * self.dim * 4 and bool(np.isfinite(np.frombuffer(body, "<f4")).all())
        try:
            answer = orjson.loads(body)
        except ValueError:
            return False
        return isinstance(answer, dict) and self._is_whole_json(answer)

    def difference(self, index: int, version: bytes | None, body: bytes) -> float:
        """Return 0 if the body of a 200 is whole, else infinity: a check that knows no answers."""
        return 0.0 if self.is_whole(body) else math.inf

    def vectors(self, body: bytes) -> Vectors:
        """Return the vectors `(rows, D)` of a whole body of /predict."""
        if self.wire == "octet":
            return np.frombuffer(body, "<f4").reshape(self.rows, self.dim)
        answer = orjson.loads(body)
        return np.asarray([answer["vector"]] if self.rows == 1 else answer["vectors"], np.float32)

    def _is_whole_json(self, answer: dict[str, object]) -> bool:
        if self.route == "retrieve":
            results = answer.get("results")
            return isinstance(results, list) and all(map(_is_result, results))
        vectors = [answer.get("vector")] if self.rows == 1 else answer.get("vectors")
        return isinstance(vectors, list) and len(vectors) == self.rows and all(map(self._is_vector, vectors))

    def _is_vector(self, vector: object) -> bool:
        if not isinstance(vector, list) or len(vector) != self.dim:
            return False
        try:
            # One pass in C: the sum shows any NaN, infinity or non-number.
            return math.isfinite(sum(vector))
        except TypeError:
            return False


@dataclass(frozen=True)
class Answers:
    """The right answers, `(N, D)` by version, to requests made of N contexts; None stands for any other version."""

    exchange: Exchange
    by_version: Mapping[str | None, Vectors]

    @classmethod
    def read(cls, exchange: Exchange, path: Path) -> Self:
        """Read an .npz file with the answers by version, or an .npy file with those of any version.

        Raises:
            PlanError: the file cannot be read.
        """
        try:
            stored = np.load(path, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                return cls(exchange, {None: stored})
            with stored:
                return cls(exchange, dict(stored))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path}: {error}") from error

    def difference(self, index: int, version: bytes | None, body: bytes) -> float:
        """Return the largest difference of one component to the answers of `version` to request `index`.

        Infinity if the body is not whole or the version is unknown.
        """
        known = self.by_version.get((version or b"").decode("latin-1"), self.by_version.get(None))
        if known is None or not self.exchange.is_whole(body):
            return math.inf
        rows = (index + np.arange(self.exchange.rows)) % len(known)
        return float(np.abs(self.exchange.vectors(body) - known[rows]).max())


def encode(exchange: Exchange, url: str, extra: Sequence[tuple[str, str]], contexts: Vectors) -> list[bytes]:
    """Return whole HTTP/1.1 requests, head and body, for the base `url`; `extra` headers replace the usual ones."""
    base = urlsplit(url)
    target = base.path.rstrip("/") + exchange.path
    ours = {"Host": base.netloc.rpartition("@")[2], "User-Agent": "lvm-loadtest", **exchange.headers}
    ours["Content-Type"] = exchange.media_type(contexts)
    replaced = {name.lower() for name, _ in extra}
    headers = [item for item in ours.items() if item[0].lower() not in replaced] + list(extra)
    head = f"{exchange.method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
    return [
        head.encode("latin-1") + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in exchange.bodies(contexts)
    ]


def _json(context: Vectors) -> bytes:
    # Nine digits represent a float32 exactly; a Python float would send seventeen.
    rows = ("[" + ", ".join([f"{x:.9g}" for x in row]) + "]" for row in context.tolist())
    return ("[" + ", ".join(rows) + "]").encode()


def _is_result(result: object) -> bool:
    return isinstance(result, dict) and _is_finite(result.get("score", 0.0))


def _is_finite(number: object) -> bool:
    return isinstance(number, (float, int)) and math.isfinite(number)
