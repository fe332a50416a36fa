"""What to run: a Plan is one step of load, a scenario is a list of steps in `scenarios.toml`."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

Wire = Literal["json", "octet"]
Route = Literal["predict", "retrieve", "livez", "readyz"]
Arrivals = Literal["fixed", "poisson", "closed"]

# Fraction of the intended requests; below it the load was not the intended one.
MIN_OFFERED = 0.9
SCENARIOS = Path(__file__).with_name("scenarios.toml")
_NAME = re.compile(r"[\w.-]+")
_SECRET = {"authorization", "proxy-authorization", "cookie", "x-api-key"}
_CHOICES = {"wire": Wire, "route": Route, "arrivals": Arrivals}
_MULTIPLES = {"times": "rate", "min_goodput_times": "min_goodput"}


class PlanError(ValueError):
    """A plan or scenario that cannot be run as written."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step: a load on one route for some seconds, and the limits that it has to hold.

    An open loop has a `rate`, requests per second, evenly spaced ("fixed") or "poisson". A "closed" loop has none: it
    keeps `connections` requests in flight. Responses are good if they differ by at most `tolerance` from `answers`.
    The command line has an option for every annotated field.
    """

    url: Annotated[str, "base URL of the service"]
    seconds: Annotated[float, "how long requests start, after the warm-up [s]"]
    rate: Annotated[float, "requests per second of an open loop; base rate of a scenario"] = 0.0
    name: Annotated[str, "name of the step"] = "run"
    wire: Annotated[Wire, "format of contexts and answers"] = "json"
    route: Annotated[Route, "route of the requests"] = "predict"
    arrivals: Annotated[Arrivals, "spacing of requests, or a closed loop"] = "fixed"
    rows: Annotated[int, "contexts of a request"] = 1
    connections: Annotated[int, "most connections; a closed loop keeps a request in flight on each"] = 256
    timeout: Annotated[float, "from the intended start to the answer [s]"] = 10.0
    warmup: Annotated[float, "same load before it, not counted [s]"] = 0.0
    seed: Annotated[int, "seed of Poisson arrivals"] = 0
    contexts: Annotated[str | None, "file of floats (N, T, D) to send instead of the shipped ones, .npy"] = None
    headers: tuple[tuple[str, str], ...] = ()
    query: Annotated[str, "added to the query string of every request"] = ""
    source: Annotated[str | None, "address to send from"] = None
    answers: Annotated[str | None, "file of right answers (N, D) to the contexts: .npz by version, or .npy"] = None
    tolerance: Annotated[float, "largest difference of one component to them"] = 1e-4
    check_every: Annotated[int, "check one of so many responses"] = 1
    max_error_rate: Annotated[float, "fraction of requests"] = 0.001
    max_p99_ms: Annotated[float | None, "latency of good answers [ms]"] = None
    min_goodput: Annotated[float | None, "whole 200 answers per second"] = None
    min_offered: Annotated[float, "fraction of requests sent in time"] = MIN_OFFERED

    def __post_init__(self) -> None:
        """Reject what cannot be run, with a message a person can act on."""
        for name, literal in _CHOICES.items():
            _demand(getattr(self, name) in get_args(literal), f"{name} must be one of {get_args(literal)}")
        _demand(urlsplit(self.url).scheme in ("http", "https"), f"not an http(s) URL: {self.url}")
        _demand(bool(urlsplit(self.url).hostname), f"no host in the URL: {self.url}")
        for name in ("seconds", "timeout", "rows", "connections", "check_every"):
            _demand(0 < getattr(self, name) < float("inf"), f"{name} must be above 0 and finite")
        _demand(0 <= self.warmup < float("inf"), "warmup must not be below 0 s")
        if self.is_closed:
            _demand(self.rate == 0, "a closed loop has no rate; connections sets its load")
        else:
            _demand(0 < self.rate < float("inf"), "rate must be above 0 and finite")
            _demand(self.rate * self.seconds >= 1, "rate x seconds is less than one request")
        _demand(self.route == "predict" or self.rows == 1, "only /predict takes more than one context")
        _demand(self.answers is None or self.route == "predict", "only answers of /predict can be compared")
        _demand(self.query.isprintable() and " " not in self.query, f"not a query: {self.query!r}")
        _demand(_NAME.fullmatch(self.name) is not None, f"a name has only letters, digits, . and -: {self.name!r}")
        for name, value in self.headers:
            _demand(bool(name) and not {"\r", "\n"} & {*name, *value}, f"not a header: {name}: {value!r}")

    @property
    def is_closed(self) -> bool:
        """Whether the loop is closed: a request starts when another one ends."""
        return self.arrivals == "closed"

    def echo(self) -> dict[str, Any]:
        """Return the plan for a report, without the values of secret headers."""
        shown = {key: "***" if key.lower() in _SECRET else value for key, value in self.headers}
        return asdict(self) | {"headers": shown}


def read_scenario(name: str, flags: Mapping[str, Any], path: Path = SCENARIOS) -> list[Plan]:
    """Return the plans of scenario `name`; `flags` fill in what a step leaves open, their `rate` is the base.

    A step gives its rate as `rate` (requests/s) or as `times` the base rate of the scenario.

    Raises:
        PlanError: the file or the scenario cannot be read, or a step cannot be run.
    """
    try:
        scenarios = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error
    if name not in scenarios:
        raise PlanError(f"no scenario {name!r} in {path}; available: {', '.join(scenarios)}")
    scenario = scenarios[name]
    base = flags.get("rate", scenario.get("rate", 0))
    _demand(bool(scenario.get("steps")), f"scenario {name!r} has no steps")
    rest = {key: value for key, value in flags.items() if key != "rate"}
    return [_step(dict(step), rest, base) for step in scenario["steps"]]


def _step(step: dict[str, Any], flags: dict[str, Any], base: float) -> Plan:
    known = {option.name for option in fields(Plan)} | _MULTIPLES.keys()
    _demand(step.keys() <= known, f"unknown keys in a step: {', '.join(sorted(step.keys() - known))}")
    if "rate" not in step and (flags | step).get("arrivals") != "closed":
        step.setdefault("times", 1.0)
    for multiple, name in _MULTIPLES.items():
        if multiple in step:
            _demand(name not in step, f"a step has {name} or {multiple}, not both")
            step[name] = step.pop(multiple) * base
    return make_plan({**flags, **step})


def make_plan(values: Mapping[str, Any]) -> Plan:
    """Return a Plan of parsed values.

    Raises:
        PlanError: a value is missing, of the wrong type, or cannot be run.
    """
    try:
        return Plan(**values)
    except TypeError as error:
        raise PlanError(str(error).replace("Plan.__init__()", "a plan")) from error


def _demand(holds: bool, complaint: str) -> None:
    if not holds:
        raise PlanError(complaint)
