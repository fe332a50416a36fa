"""`lvm diagnose` says the same in tables, JSON and a picture, each as wide as a small terminal."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import LVM, SHIPPED

DATA = ("--data", str(SHIPPED / "retriever"), "--sample", "200")


def diagnose(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LVM_REGISTRY": str(SHIPPED)}
    return subprocess.run([LVM, "diagnose", *words], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("steps", ["1", "3", "8"])
def test_tables_fit_a_terminal_of_80_columns(steps: str) -> None:
    done = diagnose("transformer-baseline", *DATA, "--steps", steps)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Answers are nearer to the last chunk read than to the next one" in " ".join(done.stdout.split())
    assert "200 windows" in done.stderr
    assert "drawn from" in done.stderr


def test_json_and_picture_have_the_figures(tmp_path: Path) -> None:
    done = diagnose("gmn", *DATA, "--json", "--plot", str(tmp_path / "figures.png"))
    found = json.loads(done.stdout)
    assert found["version"].startswith("gmn/")
    assert found["verdict"]["kind"] == "topic"
    assert found["offsets"] == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert [part["coherence"] for part in found["coherence"]] == ["low", "middle", "high"]
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_data_of_another_dimension_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.eye(40, dtype=np.float32))
    done = diagnose("primary", "--data", str(tmp_path / "narrow.npy"))
    assert (done.returncode, done.stdout) == (65, "")
    assert "narrow.npy has vectors with D = 40; the model reads D = 384" in done.stderr
