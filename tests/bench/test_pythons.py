"""Pythons side by side: ratios within a round, named by version."""

import platform
import sys

from bench.pythons import launch, to_markdown


def test_table_has_ratios_to_the_first_python_within_a_round() -> None:
    first = [{("json", 1): rate, ("octet", 32): 2 * rate} for rate in (100.0, 50.0, 200.0)]
    second = [{("json", 1): 110.0, ("octet", 32): 220.0}, first[1], first[2]]
    assert to_markdown({"3.11.7": first, "3.14.8": second}).splitlines() == [
        "| Python | json, 1 connection | octet, 32 connections |",
        "| --- | --- | --- |",
        "| 3.11.7 | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |",
        "| 3.14.8 | 1.00 (1.00 to 1.10) | 1.00 (1.00 to 1.10) |",
    ]


def test_a_server_is_named_by_the_version_of_its_python() -> None:
    started = launch(sys.executable)
    assert (started.name, started.command[0]) == (platform.python_version(), sys.executable)
