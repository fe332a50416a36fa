"""Capacity on paper: what a rate and an objective want."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lvm.cli.arguments import AsJson
from lvm.cli.output import print_json, print_table, say


def plan(
    rate: Annotated[float, typer.Option(min=0.001, help="Requests per second at the peak.")],
    p99: Annotated[float, typer.Option(min=0.001, help="Milliseconds that 99 % of them may take at most.")],
    net: Annotated[str, typer.Option(help="A net that was measured: amn, gru, gmn.")] = "amn",
    wire: Annotated[Literal["octet", "json"], typer.Option(help="How contexts are sent.")] = "octet",
    rows: Annotated[int, typer.Option(min=1, help="Contexts of a request.")] = 1,
    vectors: Annotated[float, typer.Option(min=0, help="Vectors to search for each request; 0: none.")] = 0,
    cores: Annotated[int | None, typer.Option(min=1, help="Of a machine; default those of this one.")] = None,
    memory_gb: Annotated[float, typer.Option(min=0.1, help="Of a machine.")] = 8.0,
    costs: Annotated[
        Path | None, typer.Option(help="What `python -m bench.capacity measure` wrote; default what ships.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how many machines a load wants.

    Workers, memory and shards of the index, from measured costs and a simulation; docs/capacity.md has the method.
    """
    from bench.capacity import sizing, table
    from bench.capacity.costs import SHIPPED, Costs
    from service.settings import cores as here

    demand = sizing.Demand(rate, p99, net, wire, rows, round(vectors), cores or here(), memory_gb)
    found = sizing.plan(Costs.read(costs or SHIPPED), demand)
    if as_json:
        print_json(found)
        return
    print_table(("what", "value", "because"), table.of_plan(found))
    say(f"costs of {found['costs']['machine']}, {found['costs']['date']}")
