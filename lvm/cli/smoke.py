"""The smoke test: checks a running service from outside, over HTTP, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import perf_counter, sleep
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from models.registry.alias import Alias, predictors_to_show
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry, UnknownVersion
from models.runtimes import MIN_PARITY
from models.vectors import Floats

Pairs = tuple[Floats, Floats]  # contexts (G, T, D), next vectors (G, D)
Outcome = Literal["ok", "failed", "skipped"]

PROBES = ("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready")
OCTETS, PROBLEM = "application/octet-stream", "application/problem+json"
TOLERANCE = 1e-5  # largest difference between the encodings of one answer
ROWS = 8  # contexts that a net is asked to predict from
TRIES, PAUSE_S = 10, 0.1  # the service counts an answer shortly after it is sent
ERRORS: Mapping[str, tuple[int, str, str, dict[str, Any]]] = {
    "malformed": (400, "POST", "/predict", {"content": b"{", "headers": {"content-type": "application/json"}}),
    "no such route": (404, "GET", "/no-such-route", {}),
    "no such model": (404, "GET", "/v2/models/no-such-model", {}),
    "wrong method": (405, "GET", "/predict", {}),
    "wrong media type": (415, "POST", "/predict", {"content": b"x", "headers": {"content-type": "text/plain"}}),
    "wrong shape": (422, "POST", "/predict", {"json": {"context": [[1.0]]}}),
}


class Failed(Exception):
    """A check failed; the message says what was found."""


class Skipped(Exception):
    """There is nothing to check; the message says why."""


class Result(NamedTuple):
    """The name of a check, its outcome, what it found, and how long it took."""

    check: str
    outcome: Outcome
    found: str
    milliseconds: float


class Smoke:
    """Checks the service that `client` talks to.

    Args:
        client: an HTTP client with the service's base URL.
        golden: returns the golden contexts and vectors of a version's id, or None if they are not known.
        version: what `primary` must serve: name/version, a version, or a model's name; None: any.
    """

    def __init__(self, client: httpx.Client, golden: Callable[[str], Pairs | None], version: str | None = None) -> None:
        self._http = client
        self._golden = golden
        self._expected = version
        self._aliases: Mapping[str, Any] = {}
        self._cards: Mapping[str, Any] = {}
        self._sent = 0

    def run(self) -> Iterator[Result]:
        """Yield the result of each check as it ends; if the service does not answer the first, stop after it."""
        for name, check in self._checks():
            began = perf_counter()
            outcome, found = _outcome_of(check)
            yield Result(name, outcome, found, (perf_counter() - began) * 1e3)
            if not self._sent:
                return

    def _checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "probes", self._probes
        yield "models", self._models
        for alias in predictors_to_show(self._aliases):
            yield f"predict: {alias}", partial(self._predict, alias)
        yield "retrieve", self._retrieve
        for name in ERRORS:
            yield f"error: {name}", partial(self._error, name)
        yield "metrics", self._metrics

    # ---- the checks: each returns what it found, or raises

    def _probes(self) -> str:
        for path in PROBES:
            self._request("GET", path)
        return ", ".join(PROBES)

    def _models(self) -> str:
        body = self._request("GET", "/models").json()
        self._aliases = body["aliases"]
        self._cards = {version["id"]: version for version in body["versions"]}
        served: str = self._aliases[Alias.PRIMARY]["id"]
        if self._expected not in (None, served, *served.split("/")):
            raise Failed(f"primary is {served}, not {self._expected}")
        return f"primary is {served}"

    def _predict(self, alias: str) -> str:
        served = self._served(alias)
        contexts, golden = self._golden(served) or (self._contexts(served), None)
        contexts = contexts[:ROWS]
        answers = [predict(alias, contexts) for predict in (self._by_json, self._by_octets, self._by_oip)]
        difference = max(float(np.abs(answer - answers[0]).max()) for answer in answers)
        if not difference <= TOLERANCE:
            protocols = "JSON, octets and Open Inference Protocol"
            raise Failed(f"{protocols} differ by {difference:.1e}, expected at most {TOLERANCE:.0e}")
        if golden is None:
            return f"{served}; its golden vectors are not in the registry here"
        worst = float(np.vecdot(answers[0], golden[:ROWS]).min())
        if not worst >= MIN_PARITY:
            raise Failed(f"cosine {worst:.6f} to the golden vectors of {served}, expected at least {MIN_PARITY}")
        return f"{served}, cosine {worst:.6f} to its golden vectors"

    def _retrieve(self) -> str:
        served = self._served(Alias.RETRIEVER)
        context = self._contexts(self._served(Alias.PRIMARY))[0]
        body = self._request("POST", "/retrieve", json={"context": context.tolist(), "k": 3}).json()
        ids = [hit["id"] for hit in body["results"]]
        if not ids or len(set(ids)) < len(ids) or not np.isfinite([hit["score"] for hit in body["results"]]).all():
            raise Failed(f"passages {ids}")
        _expect("version", f"{body['corpus']}/{body['corpus_version']}", served)
        return f"{len(ids)} passages of {served}"

    def _error(self, name: str) -> str:
        status, method, path, options = ERRORS[name]
        answer = self._request(method, path, status, **options)
        problem = answer.json()
        _expect("media type", answer.headers["content-type"], PROBLEM)
        _expect("status in the body", problem["status"], status)
        _expect("request id in the body", problem["request_id"], answer.headers["x-request-id"])
        if status == 405:
            _expect("Allow", answer.headers["allow"], "POST")
        if status == 422 and not problem["pointer"].startswith("/context"):
            raise Failed(f"pointer {problem['pointer']}, expected a pointer into /context")
        return f"{status} {problem['detail']}"

    def _metrics(self) -> str:
        contexts = self._contexts(self._served(Alias.PRIMARY))
        before = self._requests_counted()
        for _ in range(3):
            self._by_octets(Alias.PRIMARY, contexts)
        for _ in range(TRIES):
            if (more := self._requests_counted() - before) >= 3:
                return f"{more:.0f} requests counted since 3 were sent"
            sleep(PAUSE_S)
        raise Failed(f"{more:.0f} requests counted since 3 were sent")

    # ---- requests

    def _by_json(self, alias: str, contexts: Floats) -> Floats:
        body = {"contexts": contexts.tolist(), **_named(alias)}
        answer = self._request("POST", "/predict", json=body)
        predicted = answer.json()
        self._check_source(alias, predicted["model"], predicted["version"], predicted["served_by"])
        self._check_headers(alias, answer.headers)
        return np.asarray(predicted["vectors"], np.float32)

    def _by_octets(self, alias: str, contexts: Floats) -> Floats:
        shape = "x".join(map(str, contexts.shape))
        headers = {"content-type": f"{OCTETS}; shape={shape}", "accept": OCTETS}
        octets = contexts.astype("<f4").tobytes()
        answer = self._request("POST", "/predict", content=octets, params=_named(alias), headers=headers)
        self._check_headers(alias, answer.headers)
        return np.frombuffer(answer.content, "<f4").reshape(len(contexts), -1)

    def _by_oip(self, alias: str, contexts: Floats) -> Floats:
        tensor = {"name": "context", "datatype": "FP32", "shape": contexts.shape, "data": contexts.ravel().tolist()}
        predicted = self._request("POST", f"/v2/models/{alias}/infer", json={"inputs": [tensor]}).json()
        served_by = predicted["parameters"]["served_by"]
        self._check_source(alias, predicted["model_name"], predicted["model_version"], served_by)
        output = predicted["outputs"][0]
        return np.asarray(output["data"], np.float32).reshape(output["shape"])

    def _check_headers(self, alias: str, headers: httpx.Headers) -> None:
        self._check_source(alias, headers["x-model"], headers["x-model-version"], headers["x-served-by"])

    def _check_source(self, alias: str, model: str, version: str, served_by: str) -> None:
        _expect("version", f"{model}/{version}", self._served(alias))
        _expect("alias", served_by, alias)

    def _request(self, method: str, path: str, status: int = 200, **options: Any) -> httpx.Response:
        identity = f"smoke-{self._sent}"
        headers = {**options.pop("headers", {}), "x-request-id": identity}
        answer = self._http.request(method, path, headers=headers, **options)
        self._sent += 1
        _expect(f"status of {path}", answer.status_code, status)
        _expect(f"X-Request-ID of {path}", answer.headers.get("x-request-id"), identity)
        return answer

    def _requests_counted(self) -> float:
        families = list(text_string_to_metric_families(self._request("GET", "/metrics").text))
        samples = (sample for family in families for sample in family.samples)
        return sum(s.value for s in samples if (s.name, s.labels.get("route")) == ("lvm_requests_total", "/predict"))

    def _served(self, alias: str) -> str:
        served: str = self._aliases.get(alias, {}).get("id") or ""
        if not served:
            raise Skipped(f"/models lists no version for {alias}")
        return served

    def _contexts(self, served: str) -> Floats:
        card = self._cards[served]
        drawn = np.random.default_rng(0).standard_normal((ROWS, card["context_length"], card["dim"]))
        return np.asarray(drawn / np.linalg.norm(drawn, axis=2, keepdims=True), np.float32)


def golden_of(registry: Registry) -> Callable[[str], Pairs | None]:
    """Return a function from a net's id to its golden contexts and vectors; None if `registry` lacks the version."""

    def find(served: str) -> Pairs | None:
        try:
            known = load_checkpoint(registry.find(served).path)
        except UnknownVersion:
            return None
        return known.golden_context, known.golden_vector

    return find


def _outcome_of(check: Callable[[], str]) -> tuple[Outcome, str]:
    try:
        return "ok", check()
    except Skipped as reason:
        return "skipped", str(reason)
    except (Failed, httpx.HTTPError) as fault:
        return "failed", str(fault)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return "failed", f"unexpected form of the answer: {type(error).__name__}: {error}"


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Failed(f"{what}: {found}, expected {expected}")


def _named(alias: str) -> dict[str, str]:
    return {} if alias == Alias.PRIMARY else {"model": alias}
