"""`python -m loadtest`: send load in an open or a closed loop and compare the outcome with thresholds."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from loadtest import driver, report
from loadtest.plan import SCENARIOS, Arrivals, Plan, PlanError, Route, Wire, make_plan, read_scenario
from loadtest.report import Summary

_NOT_IN_PLAN = ("scenario", "scenarios", "report", "json", "record")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if every threshold holds, 1 if not, 2 for a usage error."""
    options = vars(_parser().parse_args(argv))
    chosen = {key: options.pop(key) for key in _NOT_IN_PLAN if key in options}
    try:
        summaries = [_run(plan, chosen) for plan in _plans(options, chosen)]
    except PlanError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if "json" in chosen:
        print(report.to_json(summaries, chosen.get("scenario")))
    if "report" in chosen:
        report.write(Path(chosen["report"]), summaries, chosen.get("scenario"))
    return 0 if all(summary.ok for summary in summaries) else 1


def _plans(flags: dict[str, Any], chosen: Mapping[str, Any]) -> list[Plan]:
    flags["headers"] = tuple(_header(line) for line in flags.get("headers", ()))
    if "scenario" in chosen:
        return read_scenario(chosen["scenario"], flags, Path(chosen.get("scenarios", SCENARIOS)))
    return [make_plan(flags)]


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon:
        raise PlanError(f"header is {line!r}; expected 'Name: value'")
    return name.strip(), value.strip()


def _run(plan: Plan, chosen: Mapping[str, Any]) -> Summary:
    record = driver.run(plan, _bar if sys.stderr.isatty() else None)
    summary = report.summarise(plan, record)
    for warning in summary.warnings:
        print(f"loadtest: {plan.name}: {warning}", file=sys.stderr)
    if "json" not in chosen:
        print(report.to_text(summary), flush=True)
    if "record" in chosen:
        record.save(Path(chosen["record"]) / f"{plan.name}.npz")
    if "report" in chosen:
        # Importing matplotlib takes longer than a smoke test.
        from loadtest import plot

        plot.draw(Path(chosen["report"]) / f"{plan.name}.png", plan, record)
    return summary


def _bar(finished: int, total: int) -> None:
    width = 40 * finished // total
    end = "\r\x1b[K" if finished == total else ""
    print(f"\r[{'#' * width:<40}] {finished}/{total}{end}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    _add_load(parser.add_argument_group("load"))
    _add_limits(parser.add_argument_group("thresholds (exit 1 if one is broken)"))
    _add_output(parser.add_argument_group("scenario and output"))
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", required=True, help="base URL of the service")
    group.add_argument("--name", help="of the step, default run")
    group.add_argument("--rate", type=float, help="arrivals per second of an open loop; base rate of a scenario")
    group.add_argument("--seconds", type=float, help="how long requests start, after the warm-up [s]")
    group.add_argument("--wire", choices=get_args(Wire), help="default json")
    group.add_argument("--route", choices=get_args(Route), help="default predict")
    group.add_argument(
        "--arrivals", choices=get_args(Arrivals), help="spacing of arrivals, or a closed loop; default fixed"
    )
    group.add_argument("--rows", type=int, help="contexts per request, default 1")
    group.add_argument(
        "--connections",
        type=int,
        metavar="MAX",
        help="most connections; a closed loop keeps one request in flight on each; default 256",
    )
    group.add_argument("--timeout", type=float, help="from the intended start to the answer [s], default 10")
    group.add_argument("--warmup", type=float, help="same load before it, not counted [s], default 0")
    group.add_argument("--seed", type=int, help="of Poisson arrivals, default 0")
    group.add_argument("--contexts", metavar="FILE.npy", help="floats (N, T, D) to send instead of the shipped ones")
    group.add_argument(
        "--header", dest="headers", action="append", metavar="'K: V'", help="repeatable; a token comes from LVM_TOKEN"
    )
    group.add_argument("--query", metavar="A=B", help="added to the query string of every request")
    group.add_argument("--source", metavar="ADDRESS", help="address to send from")
    group.add_argument(
        "--answers", metavar="FILE", help="right answers (N, D) to the contexts: .npz by version, or .npy"
    )
    group.add_argument("--tolerance", type=float, help="largest difference of a component to them, default 1e-4")
    group.add_argument("--check-every", type=int, metavar="N", help="check one of N responses, default 1")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-error-rate", type=float, metavar="F", help="fraction of arrivals, default 0.001")
    group.add_argument("--max-p99-ms", type=float, metavar="F", help="latency of good answers [ms]")
    group.add_argument("--min-goodput", type=float, metavar="F", help="whole 200 answers per second")
    group.add_argument("--min-offered", type=float, metavar="F", help="fraction of arrivals sent in time, default 0.9")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scenario", metavar="NAME", help="run these steps in order; flags fill in what they leave open"
    )
    group.add_argument("--scenarios", metavar="FILE.toml", help="file of scenarios, default the shipped one")
    group.add_argument("--report", metavar="DIR", help="write report.json, report.md and a PNG per step")
    group.add_argument("--record", metavar="DIR", help="write what became of every arrival, an .npz per step")
    group.add_argument("--json", action="store_true", help="one JSON object to stdout instead of the table")


if __name__ == "__main__":
    sys.exit(main())
