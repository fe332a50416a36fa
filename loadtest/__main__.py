"""`python -m loadtest`: send load in an open or a closed loop and compare the outcome with thresholds."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from loadtest import driver, report
from loadtest.plan import SCENARIOS, Plan, PlanError, make_plan, read_scenario
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
    record = driver.run(plan, _progress_bar if sys.stderr.isatty() else None)
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


def _progress_bar(finished: int, total: int) -> None:
    width = 40 * finished // total
    end = "\r\x1b[K" if finished == total else ""
    print(f"\r[{'#' * width:<40}] {finished}/{total}{end}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--header", dest="headers", action="append", metavar="'K: V'", help="repeatable; a token comes from LVM_TOKEN"
    )
    limits = parser.add_argument_group("thresholds (exit 1 if one is broken)")
    for option in fields(Plan):
        if get_origin(option.type) is Annotated:
            _add_option(limits if option.name.startswith(("max_", "min_")) else load, option)
    _add_output(parser.add_argument_group("scenario and output"))
    return parser


def _add_option(group: argparse._ArgumentGroup, option: Field[Any]) -> None:
    annotation, about = get_args(option.type)
    kinds = get_args(annotation) or (annotation,)
    if option.default not in (MISSING, None, "", 0.0):
        about = f"{about}, default {option.default}"
    kind: dict[str, Any] = {"choices": kinds} if isinstance(kinds[0], str) else {"type": kinds[0]}
    flag = f"--{option.name.replace('_', '-')}"
    group.add_argument(flag, required=option.name == "url", help=about, **kind)


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--scenario", metavar="NAME", help="run these steps; flags fill in what they leave open")
    group.add_argument("--scenarios", metavar="FILE.toml", help="file of scenarios, default the shipped one")
    group.add_argument("--report", metavar="DIR", help="write report.json, report.md and a PNG per step")
    group.add_argument("--record", metavar="DIR", help="write the columns of all requests, an .npz per step")
    group.add_argument("--json", action="store_true", help="one JSON object to stdout instead of the table")


if __name__ == "__main__":
    sys.exit(main())
