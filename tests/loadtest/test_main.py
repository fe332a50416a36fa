"""The command line: figures on stdout, all else on stderr, and a meaningful exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import main

LOAD = ["--rate", "200", "--seconds", "0.1", "--wire", "octet", "--min-offered", "0"]


def test_thresholds_that_hold_exit_0(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", serve().url, *LOAD]) == 0
    out, err = capsys.readouterr()
    assert "answered 20 " in out
    assert "\r" not in err


def test_broken_threshold_exits_1(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake = serve(lambda n: {"status": 503} if n == 3 else {})
    assert main(["--url", fake.url, *LOAD]) == 1
    assert "BROKEN error_rate 0.05 <= 0.001" in capsys.readouterr().out
    assert main(["--url", fake.url, *LOAD, "--max-error-rate", "0.05"]) == 0
    assert main(["--url", fake.url, *LOAD, "--min-goodput", "100000"]) == 1


def test_json_is_one_object_with_the_configuration(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve().url
    assert main(["--url", url, *LOAD, "--json", "--header", "X-A: b:c", "--arrivals", "poisson"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["config"]["headers"] == {"X-A": "b:c"}
    assert figures["config"]["arrivals"] == "poisson"
    assert figures["ok"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        ["--url", "nowhere", *LOAD],
        ["--url", "http://h"],
        ["--url", "http://h", *LOAD, "--header", "no colon"],
        ["--url", "http://h", *LOAD, "--contexts", "/none.npy"],
        ["--url", "http://h", "--scenario", "none"],
    ],
)
def test_invalid_plan_exits_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("loadtest: ")) == ("", True)


@pytest.mark.parametrize("wrong", [[], ["--url", "http://h", "--wire", "xml"], ["--url", "http://h", "--ra", "1"]])
def test_invalid_command_line_exits_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(wrong)
    assert leaving.value.code == 2


def test_closed_loop_is_named_in_the_reports(serve: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    closed = ["--arrivals", "closed", "--connections", "2", "--seconds", "0.1", "--report", str(tmp_path)]
    assert main(["--url", serve().url, *closed]) == 0
    assert "2 connections, closed loop for 0.1 s" in capsys.readouterr().out
    assert "Closed loop; latency" in (tmp_path / "report.md").read_text()


def test_scenario_runs_its_steps_in_order_and_reports_each(serve: Any, tmp_path: Path) -> None:
    fake = serve(lambda n: {} if n < 10 else {"status": 503})
    first, second = '{ name = "first", seconds = 0.1 }', '{ name = "second", times = 2, seconds = 0.1 }'
    (tmp_path / "s.toml").write_text(f"[two]\nrate = 100\nsteps = [{first}, {second}]")
    flags = ["--scenarios", str(tmp_path / "s.toml"), "--report", str(tmp_path / "out"), "--min-offered", "0"]
    assert main(["--url", fake.url, "--scenario", "two", *flags]) == 1
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert [(step["config"]["name"], step["sent"], step["ok"]) for step in written["steps"]] == [
        ("first", 10, True),
        ("second", 20, False),
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "first.png", "second.png",
    }  # fmt: skip


def test_draws_no_bar_into_a_pipe_and_imports_nothing_of_the_service(serve: Any) -> None:
    code = (
        "import sys, runpy; sys.argv[1:] = {argv!r}\n"
        "try: runpy.run_module('loadtest', run_name='__main__')\n"
        "finally: assert not {{'service', 'models', 'torch', 'matplotlib'}} & sys.modules.keys()"
    ).format(argv=["--url", serve().url, *LOAD, "--json"])
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "\r" in done.stderr) == (0, False), done.stderr
    assert json.loads(done.stdout)["answered"] == 20
