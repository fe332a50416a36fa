"""The commands that `lvm` suggests work as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lvm.cli import next_steps
from models.registry.registry import Registry
from tests.conftest import LVM, PATIENCE_S
from tests.fakes import add_version, card, registry_of


def suggested(stderr: str) -> list[str]:
    """Return the words of the first command that is suggested."""
    hint = next(line for line in stderr.splitlines() if line.startswith("next: "))
    (command, *_) = re.findall(r"`lvm (.*?)`", hint)
    return shlex.split(command)


def test_each_command_from_vectors_to_a_served_corpus_is_suggested_by_the_one_before(
    shipped: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "My Data.npz", vectors=np.random.default_rng(0).standard_normal((300, 384)).astype("f4"))
    words = ["data", str(tmp_path / "My Data.npz"), str(tmp_path / "My Data"), "--encoder", "all-MiniLM-L6-v2"]
    ran = []
    for _ in range(3):
        ran.append(words)
        env = {**os.environ, "LVM_REGISTRY": str(shipped)}
        done = subprocess.run([LVM, *words], capture_output=True, text=True, env=env, check=False, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        words = suggested(done.stderr) if words[0] != "promote" else []
    data = str(tmp_path / "My Data")
    assert ran[1:] == [
        ["corpus", "my-data", "--data", data, "--towers", "retriever"],
        ["promote", "retriever", "my-data"],
    ]
    assert Registry(shipped).resolve("retriever").name == "my-data"


def test_vectors_that_the_towers_do_not_read_are_searched_without_towers(shipped: Path) -> None:
    for encoder, dim in (("another", 384), ("all-MiniLM-L6-v2", 768)):
        hint = next_steps.after_data(Registry(shipped), Path("x"), {"encoder": encoder, "dim": dim, "windows": 9})
        assert suggested(hint) == ["corpus", "x", "--data", "x"]


def test_a_version_that_the_gate_would_reject_says_why(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, fallback="gru")
    hint = next_steps.after_version(registry, add_version(registry, "amn"))
    assert "`lvm promote primary amn` would be rejected: the card of amn/" in hint


def test_a_version_is_named_in_full_if_its_model_has_another_or_is_called_as_an_alias(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    first, odd = add_version(registry, "amn"), add_version(registry, "candidate")
    assert (next_steps.name_of(registry, first), next_steps.name_of(registry, odd)) == ("amn", odd.id)
    second = add_version(registry, "amn", "second")
    assert next_steps.name_of(registry, second) == second.id


@pytest.mark.parametrize(
    ("kind", "config", "command"),
    [
        ("two_tower", {}, "lvm corpus d --data d --towers tt"),
        ("reranker", {"towers": "tt/1"}, "lvm corpus d --data d --towers tt/1 --reranker tt"),
    ],
)
def test_towers_and_rerankers_are_for_a_corpus(tmp_path: Path, kind: str, config: dict[str, str], command: str) -> None:
    text = card("tt", kind=kind, config=config).to_markdown()
    version = Registry(tmp_path).add("tt", {"README.md": text.encode()})
    assert f"`{command}`" in next_steps.after_version(Registry(tmp_path), version, [Path("d")])


def test_the_secret_in_a_url_is_not_printed() -> None:
    assert next_steps.after_push("s3://user:secret@bucket/x") == (
        "next: `LVM_REGISTRY=s3://bucket/x lvm serve` serves it, here or on another machine"
    )
