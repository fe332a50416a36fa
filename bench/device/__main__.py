"""Checks and measures the device of this machine, section by section, and writes one JSON. Standard library only.

Each section is a process of its own with a limit of time. It prints a line of JSON for each row, so that a section that
fails or is stopped keeps the rows that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import perf_counter
from typing import Any

from bench.device import kit

# Seconds of each section.
SECTIONS: Mapping[str, float] = {"machine": 25, "golden": 50, "batches": 60, "service": 105, "training": 55}
KIT = kit.ROOT / "runs" / "device-kit"


def main(argv: Sequence[str] | None = None) -> None:
    """Write device.json; without the device, say what is missing."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.device", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="cuda, mps or cpu; default cuda")
    parser.add_argument("--tiny", action="store_true", help="few repetitions, to see that the script works")
    parser.add_argument("--registry", type=Path, default=kit.ROOT / "artifacts" / "lvm", help="default what ships")
    parser.add_argument("--patience", type=float, default=1, help="factor on the seconds of the sections; default 1")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections; default all")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or "runs/device"), help="$OUT, or runs/device"
    )
    options = parser.parse_args(argv)
    with TemporaryDirectory(prefix="lvm-device-") as scratch:
        kit.unpack(KIT, Path(scratch))
        kit.use(Path(scratch))
        reason = reason_not_to_run(options.device)
        if reason:
            print(f"nothing measured: {reason}")
            return
        options.out.mkdir(parents=True, exist_ok=True)
        found = measure(options, kit.environment(Path(scratch)))
    (options.out / "device.json").write_text(json.dumps(found, indent=1))
    print(f"{options.out / 'device.json'}: {', '.join(f'{name} {_outcome(each)}' for name, each in found.items())}")


def reason_not_to_run(device: str) -> str:
    """Return what is missing here, an empty text if nothing is."""
    missing = kit.missing()
    if missing:
        return f"{', '.join(missing)} not installed; `make device-kit` downloads wheels for a machine without an index"
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return "" if there.get(device) else f"torch finds no {device} device here"


def measure(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return, by section, its rows and seconds, and the error that ended it, if one did."""
    found = {}
    for name in options.only:
        began = perf_counter()
        rows, error = _run(name, options, environment)
        found[name] = {"rows": rows, "seconds": round(perf_counter() - began, 1), "error": error}
        print(f"{name}: {_outcome(found[name])}", flush=True)
        for row in rows:
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return found


def _outcome(section: Mapping[str, Any]) -> str:
    failed = sum("error" in row for row in section["rows"])
    parts = [f"{len(section['rows'])} rows in {section['seconds']} s", *([f"{failed} failed"] if failed else [])]
    return ", ".join([*parts, *([f"ended by: {section['error']}"] if section["error"] else [])])


def _run(name: str, options: argparse.Namespace, environment: Mapping[str, str]) -> tuple[list[dict[str, Any]], str]:
    limit = SECTIONS[name] * options.patience
    command = [sys.executable, "-m", "bench.device.sections", name, options.device, str(options.registry.absolute())]
    command += ["--tiny"] if options.tiny else []
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        # a session of its own, so that a server that it started ends with it
        process = subprocess.Popen(
            command, cwd=kit.ROOT, env=dict(environment), stdout=output, stderr=errors, start_new_session=True
        )
        error = _wait(process, limit)
        output.seek(0)
        errors.seek(0)
        rows = [json.loads(line) for line in output if line.startswith("{") and line.endswith("\n")]
        return rows, error and f"{error}: {errors.read()[-2000:].strip()}"


def _wait(process: subprocess.Popen[bytes], limit: float) -> str:
    """Return why a section ended before its end, an empty text if it did not."""
    try:
        status = process.wait(limit)
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return f"stopped after {limit:g} s"


if __name__ == "__main__":
    main()
