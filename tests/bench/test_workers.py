"""Workers side by side: ratios within a round, and processor time by process."""

import os
import subprocess
import sys

from bench.workers import processes, to_markdown


def test_table_has_ratios_within_a_round_and_median_times_by_process() -> None:
    rounds = [
        {
            "1 worker": {"per_second": rate, "roles": ["service"], "us": [200.0 * slow]},
            "2 workers": {"per_second": rate, "roles": ["supervisor", "worker"], "us": [0.0, 250.0 * slow]},
            "2 + owner": {"per_second": rate * 3, "roles": ["supervisor", "owner"], "us": [0.0, 100.0 * slow]},
        }
        for rate, slow in ((1000.0, 1), (500.0, 2), (900.0, 1.1))
    ]
    assert to_markdown(rounds).splitlines()[2:] == [
        "| 1 worker | 1.00 | 1.00 to 1.00 | 1.00 | 220 | service 220 |",
        "| 2 workers | 1.00 | 1.00 to 1.00 | 1.60 | 275 | supervisor 0, worker 275 |",
        "| 2 + owner | 3.00 | 3.00 to 3.00 | - | 110 | supervisor 0, owner 110 |",
    ]


def test_names_the_roles_of_child_processes() -> None:
    waits = [sys.executable, "-c", "input(print(flush=True))"]
    with subprocess.Popen([*waits, "own"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        # Its command line is there once it runs.
        child.stdout.readline()
        assert processes(child.pid) == {child.pid: "service"}
        found = processes(os.getpid())
        assert (found[os.getpid()], found[child.pid]) == ("supervisor", "owner")
        child.communicate(b"\n")
