"""The check of a device says what is missing, keeps what sections measured before they failed, and runs on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from bench.device import kit
from bench.options import ROOT, SHIPPED

SECTIONS = ("machine", "golden", "batches", "service", "training")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the shipped AMN only, and an alias whose version was left behind."""
    root = tmp_path_factory.mktemp("registry")
    (root / "models").mkdir()
    shutil.copytree(SHIPPED / "models" / "amn", root / "models" / "amn")
    for alias in ("primary", "fallback"):
        (root / alias).symlink_to((SHIPPED / alias).readlink())
    return root


def check(out: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.device", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def found(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the whole check on the CPU found."""
    out = tmp_path_factory.mktemp("out")
    done = check(out, "--device", "cpu", "--tiny", "--patience", "10", "--registry", str(registry))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["device.json"]
    read: Mapping[str, Any] = json.loads((out / "device.json").read_text())
    return read


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is missed elsewhere")
def test_without_a_gpu_it_says_so_and_succeeds(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert (done.returncode, done.stdout) == (0, "nothing measured: torch finds no cuda device here\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.device
def test_every_section_runs_to_its_end(found: Mapping[str, Any]) -> None:
    assert tuple(found) == SECTIONS
    assert [found[name]["error"] for name in SECTIONS] == [""] * 5
    assert all(found[name]["rows"] for name in SECTIONS)


@pytest.mark.device
def test_nets_are_held_to_their_golden_vectors(found: Mapping[str, Any]) -> None:
    row = found["golden"]["rows"][0]
    assert (row["net"], row["precision"], row["runtime"]) == ("amn", "float32", "onnxruntime")
    assert row["golden_cosine"] > 0.999999
    assert row["torch_difference"] < 1e-5
    assert row["alone_difference"] < 1e-5


@pytest.mark.device
def test_batches_are_timed_by_size(found: Mapping[str, Any]) -> None:
    rows = {row["run"]: row for row in found["batches"]["rows"]}
    assert rows.keys() == {"float32", "bf16", "plain torch"}
    assert all(time > 0 for row in (rows["float32"], rows["plain torch"]) for time in row["ms"].values())


@pytest.mark.device
def test_the_service_is_measured_with_a_device_worker_and_beside_it_without(found: Mapping[str, Any]) -> None:
    loads = [row for row in found["service"]["rows"] if "wire" in row]
    asked = [(row["service"], row["wire"], row["rows"], row["connections"]) for row in loads]
    assert asked == [("device", "octet", 1, 2), ("device", "json", 4, 1), ("cpu", "octet", 1, 2)]
    assert all(row["per_second"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0 for row in loads)


@pytest.mark.device
def test_an_epoch_of_training_is_timed_in_each_precision(found: Mapping[str, Any]) -> None:
    rows = found["training"]["rows"]
    assert [(row["net"], row["precision"], row["windows"]) for row in rows] == [
        ("amn", "float32", 110),
        ("amn", "bf16", 110),
    ]
    assert all(row["per_second"] > 0 for row in rows)


@pytest.mark.device
def test_a_section_that_is_too_slow_or_fails_does_not_hide_the_others(registry: Path, tmp_path: Path) -> None:
    done = check(tmp_path, *("--device", "cpu", "--tiny", "--patience", "1e-9"), *("--only", "machine", "service"))
    assert done.returncode == 0
    slow = json.loads((tmp_path / "device.json").read_text())
    assert [each["error"].partition(" s")[0] for each in slow.values()] == [
        "stopped after 2.5e-08",
        "stopped after 1.05e-07",
    ]
    done = check(
        tmp_path,
        *("--device", "cpu", "--tiny", "--patience", "10", "--registry", "/nowhere"),
        *("--only", "service", "machine"),
    )
    failed = json.loads((tmp_path / "device.json").read_text())
    assert failed["service"]["error"].startswith("exit status 1: ")
    assert "/nowhere" in failed["service"]["error"]
    assert (failed["machine"]["error"], len(failed["machine"]["rows"])) == ("", 1)
    assert "service: 0 rows" in done.stdout


def test_the_kit_is_found_by_this_process_and_its_children(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    with ZipFile(tmp_path / "kit" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "ANSWER = 42\n")
    kit.unpack(tmp_path / "kit", tmp_path / "site")
    command = [sys.executable, "-c", "import bench, carried; print(carried.ANSWER)"]
    done = subprocess.run(command, env=kit.environment(tmp_path / "site"), cwd="/", capture_output=True, check=True)
    assert done.stdout == b"42\n"


def test_everything_that_the_kit_needs_is_installed_here() -> None:
    assert kit.missing() == []
