"""Measure what requests cost on this machine (`measure`), or check the capacity that these costs predict (`check`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.capacity import check, measure, table
from bench.capacity.costs import SHIPPED
from bench.contract import harness


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it is done and every prediction was right, 1 if one was not, 2 for a usage error."""
    options = _parser().parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    harness.leave_service_core()
    if options.what == "measure":
        measure.costs(options.out, options.nets, seconds=options.seconds, with_search=True).write(options.costs)
        print(options.costs)
        return 0
    cases = [check.Case(options.net, options.rows, options.p99)] if options.net else check.CASES
    rows = check.check(options.out, cases)
    (options.out / "check.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table.of_checks(rows))
    return 0 if all(row["is_met"] for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/capacity"), help="default runs/capacity")
    commands = parser.add_subparsers(dest="what", required=True)
    costs = commands.add_parser("measure", help="write the cost model that `lvm plan` reads")
    costs.add_argument("--costs", type=Path, default=SHIPPED, help=f"file to write, default {SHIPPED.name} beside this")
    costs.add_argument("--nets", nargs="+", default=measure.NETS, help=f"that ship, default {' '.join(measure.NETS)}")
    costs.add_argument("--seconds", type=float, default=1.5, help="of one closed loop [s], default 1.5")
    knees = commands.add_parser("check", help="compare predicted and measured knee, one case or those by default")
    knees.add_argument("--net", choices=measure.NETS, help="default: gru with 8 rows a request, amn with 32")
    knees.add_argument("--rows", type=int, default=8, help="contexts of a request, default 8")
    knees.add_argument("--p99", type=float, default=100.0, help="objective [ms], default 100")
    return parser


if __name__ == "__main__":
    sys.exit(main())
