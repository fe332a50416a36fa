"""Puts load on a server from another process: `python -m loadtest`, or wrk for closed loops if it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.options import ROOT
from bench.servers import RunningServer
from bench.stats import TOLERANCE, named_ms
from loadtest.payloads import Exchange, encode
from loadtest.plan import Route, Wire
from loadtest.samples import Samples
from models.vectors import Floats

SCRIPT = ROOT / "bench" / "wrk.lua"
CONTEXTS, ANSWERS = "contexts.npy", "answers.npy"
TIMEOUT_S = 90.0
# While a closed loop is measured, one of so many responses is checked; the warm-up before it checks all.
CHECK_EVERY = 16
WARM_UP_S = 0.5
# wrk gets so many different requests, since many rows are long.
WRK_REQUESTS = 8


class WrongAnswers(RuntimeError):
    """A server failed to answer, or answered something else than it should."""


class LoadTest:
    """One `python -m loadtest` in a process of its own; it has started when this is made."""

    def __init__(self, url: str, name: str = "run", records: Path | None = None, **options: Any) -> None:
        """Send load to `url`; `options` are those of the command, `records` is the directory that keeps a record."""
        self.name = name
        self._records = records
        given = {"url": url, "name": name, **({"record": records} if records else {}), **options}
        flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "loadtest", "--json", *flags]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The load test's JSON summary; waits for the last response.

        Raises:
            RuntimeError: the load test printed only an error.
        """
        output, errors = self._process.communicate()
        if not output:
            raise RuntimeError(f"{self.name}: {errors.decode(errors='replace')}")
        found: dict[str, Any] = json.loads(output)
        return found

    @property
    def sent(self) -> int:
        """The requests that the server may have seen, warm-up included."""
        return int(self.summary["sent"] + self.summary["warmup_sent"])

    def samples(self) -> Samples:
        """Wait for the last response; return what happened to every request. It must keep a record."""
        assert self._records
        assert self.summary
        return Samples.read(self._records / f"{self.name}.npz")


@dataclass(frozen=True)
class Workload:
    """The requests for one server: contexts, and the answers to them if they are known, are in a directory (`keep`)."""

    server: RunningServer
    wire: Wire
    directory: Path
    rows: int = 1
    route: Route = "predict"

    def run(self, **options: Any) -> dict[str, Any]:
        """Return the summary of a load test with these requests; `options` are those of `python -m loadtest`.

        Raises:
            WrongAnswers: a threshold broke (by default, a response was bad), or there was no response.
        """
        contexts = self.directory / CONTEXTS
        answers = self.directory / ANSWERS
        given: dict[str, Any] = {"wire": self.wire, "rows": self.rows, "route": self.route, "contexts": contexts}
        given |= {"timeout": TIMEOUT_S, "max_error_rate": 0, **options}
        if answers.exists() and self.route == "predict":
            given |= {"answers": answers, "tolerance": TOLERANCE}
        found = LoadTest(self.server.base(self.wire), **given).summary
        if not found["ok"] or not found["answered"]:
            raise WrongAnswers(f"{self.server.name}, {self.wire} x {self.rows}: {found}")
        return found

    def warm_up(self, connections: int) -> float:
        """Send requests for half a second, check every response, return the largest difference to an answer.

        Raises:
            WrongAnswers: as `run`.
        """
        found = self.run(arrivals="closed", connections=connections, seconds=WARM_UP_S)
        return float(found["difference"])

    def measure(self, connections: int, seconds: float) -> dict[str, Any]:
        """Return requests, seconds, `per_second` and latencies (ms) of one closed loop.

        Raises:
            WrongAnswers: as `run`.
        """
        if shutil.which("wrk"):
            return self._measure_by_wrk(connections, seconds)
        found = self.run(arrivals="closed", connections=connections, seconds=seconds, check_every=CHECK_EVERY)
        return {
            "requests": found["answered"],
            "seconds": found["answered"] / found["achieved_rate"],
            "per_second": found["achieved_rate"],
            "statuses": found["statuses"],
            **named_ms(found["latency_ms"]),
        }

    def _measure_by_wrk(self, connections: int, seconds: float) -> dict[str, Any]:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={TIMEOUT_S:.0f}s"]
        command += ["-s", str(SCRIPT), self.server.url, "--", str(self.write_requests())]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + TIMEOUT_S)
        line = next(line for line in done.stdout.splitlines() if line.startswith("BENCH "))
        figures: dict[str, Any] = json.loads(line.removeprefix("BENCH "))
        if figures["errors"] or not figures["requests"]:
            raise WrongAnswers(f"{self.server.name}, {self.wire} x {self.rows}, wrk: {figures}")
        return {**figures, "per_second": figures["requests"] / figures["seconds"]}

    def write_requests(self) -> Path:
        """Write whole requests, each behind a line with its length, as wrk.lua reads them; return the file."""
        path = self.directory / f"{self.server.name}-{self.route}-{self.wire}-{self.rows}.http"
        contexts = np.load(self.directory / CONTEXTS)
        exchange = Exchange(self.route, self.wire, self.rows, contexts.shape[2])
        requests = encode(exchange, self.server.base(self.wire), (), contexts)
        chosen = requests if self.rows == 1 else requests[:WRK_REQUESTS]
        path.write_bytes(b"".join(b"%d\n%b" % (len(request), request) for request in chosen))
        return path


def generator() -> str:
    """Return what makes the load of closed loops."""
    return "wrk, 1 thread" if shutil.which("wrk") else "python -m loadtest (uvloop)"


def keep(directory: Path, contexts: Floats, answers: Floats | None = None) -> Path:
    """Write contexts `(N, T, D)` and the right answers `(N, D)` to them; return the directory, made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / CONTEXTS, contexts)
    (directory / ANSWERS).unlink(missing_ok=True)
    if answers is not None:
        np.save(directory / ANSWERS, answers)
    return directory
