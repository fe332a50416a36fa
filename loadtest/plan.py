"""What to run: a Plan is one open-loop step, a scenario a list of them kept in `scenarios.toml`."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

Wire = Literal["json", "octet"]
Route = Literal["predict", "retrieve", "livez", "readyz"]
Arrivals = Literal["fixed", "poisson"]

MIN_OFFERED = 0.9  # of the arrivals; below it the load was another than intended
SCENARIOS = Path(__file__).with_name("scenarios.toml")
_NAME = re.compile(r"[\w.-]+")
_SECRET = {"authorization", "proxy-authorization", "cookie", "x-api-key"}
_CHOICES = {"wire": Wire, "route": Route, "arrivals": Arrivals}
_MULTIPLES = {"times": "rate", "min_goodput_times": "min_goodput"}


class PlanError(ValueError):
    """A plan or scenario that cannot be run as written."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step: arrivals per second for some seconds at one route, and the limits it has to hold."""

    url: str
    rate: float
    seconds: float
    name: str = "run"
    wire: Wire = "json"
    route: Route = "predict"
    arrivals: Arrivals = "fixed"
    rows: int = 1
    connections: int = 256
    timeout: float = 10.0
    warmup: float = 0.0
    seed: int = 0
    contexts: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    query: str = ""
    source: str | None = None
    answers: str | None = None
    max_error_rate: float = 0.001
    max_p99_ms: float | None = None
    min_goodput: float | None = None
    min_offered: float = MIN_OFFERED

    def __post_init__(self) -> None:
        """Refuse what cannot be run, in words a person can act on."""
        for field, literal in _CHOICES.items():
            _demand(getattr(self, field) in get_args(literal), f"{field} is one of {get_args(literal)}")
        _demand(urlsplit(self.url).scheme in ("http", "https"), f"not an http(s) URL: {self.url}")
        _demand(bool(urlsplit(self.url).hostname), f"no host in the URL: {self.url}")
        for field in ("rate", "seconds", "timeout", "rows", "connections"):
            _demand(0 < getattr(self, field) < float("inf"), f"{field} must be above 0 and finite")
        _demand(0 <= self.warmup < float("inf"), "warmup must not be below 0 s")
        _demand(self.rate * self.seconds >= 1, "rate x seconds comes to less than one request")
        _demand(self.route == "predict" or self.rows == 1, "only /predict takes more contexts than one")
        has_octets = (self.route, self.wire) == ("predict", "octet")
        _demand(self.answers is None or has_octets, "answers are compared where they are octets of /predict")
        _demand(self.query.isprintable() and " " not in self.query, f"not a query: {self.query!r}")
        _demand(_NAME.fullmatch(self.name) is not None, f"a step is named in letters and digits: {self.name!r}")
        for name, value in self.headers:
            _demand(bool(name) and not {"\r", "\n"} & {*name, *value}, f"not a header: {name}: {value!r}")

    def echo(self) -> dict[str, Any]:
        """Return the plan for a report, with the values of secret headers left out."""
        shown = {key: "***" if key.lower() in _SECRET else value for key, value in self.headers}
        return asdict(self) | {"headers": shown}


def read_scenario(name: str, flags: Mapping[str, Any], path: Path = SCENARIOS) -> list[Plan]:
    """Turn scenario `name` into plans; `flags` fill in what a step leaves open, their `rate` is the base.

    A step gives its arrival rate as `rate` (requests/s) or as `times` the base rate of the scenario.
    """
    try:
        scenarios = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error
    if name not in scenarios:
        raise PlanError(f"no scenario {name!r} in {path}; there are: {', '.join(scenarios)}")
    scenario = scenarios[name]
    base = flags.get("rate", scenario.get("rate", 0))
    _demand(bool(scenario.get("steps")), f"scenario {name!r} has no steps")
    return [_step(dict(step), flags, base) for step in scenario["steps"]]


def _step(step: dict[str, Any], flags: Mapping[str, Any], base: float) -> Plan:
    known = {field.name for field in fields(Plan)} | _MULTIPLES.keys()
    _demand(step.keys() <= known, f"unknown keys in a step: {', '.join(sorted(step.keys() - known))}")
    if "rate" not in step:
        step.setdefault("times", 1.0)
    for multiple, field in _MULTIPLES.items():
        if multiple in step:
            _demand(field not in step, f"a step takes {field} or {multiple}, not both")
            step[field] = step.pop(multiple) * base
    return make_plan({**flags, **step})


def make_plan(values: Mapping[str, Any]) -> Plan:
    """Build a Plan from parsed values; a missing or mistyped one is a PlanError."""
    try:
        return Plan(**values)
    except TypeError as error:
        raise PlanError(str(error).replace("Plan.__init__()", "a plan")) from error


def _demand(holds: bool, complaint: str) -> None:
    if not holds:
        raise PlanError(complaint)
