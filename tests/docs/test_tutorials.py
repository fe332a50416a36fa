"""The tutorials, each from a fresh clone: every command and program runs, and prints what the tutorial shows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.docs import blocks
from tests.docs.clone import Clone, free_port
from tests.docs.proxy import running_proxy

TUTORIALS = ROOT / "docs/tutorials"
# where nginx listens in its tutorial, and what it forwards to
PROXY, BEHIND = "127.0.0.1:8080", "127.0.0.1:8000"
NOT_RUN: Mapping[str, str] = {"sudo nginx": "requires nginx and root"}
SERVING = """
lvm_serve() { command lvm serve --port 0 "$@"; }
call() { command curl -s -H "Authorization: Bearer $LVM_TOKEN" "$@"; }
predict() { call -H 'Content-Type: application/json' "$LVM_URL/predict" -d "$@"; }
"""
TOKEN = "0123456789abcdef"
# How each message in the tables of troubleshooting.md comes about; "..." stands for anything.
CAUSES: Mapping[str, str] = {
    "lvm: command not found": "bash -c 'PATH=/nowhere; lvm models'",
    "cannot listen on ": "command lvm serve",
    "refusing to listen": "LVM_TOKENS= lvm_serve --host 0.0.0.0",
    "entry 1 is malformed": "LVM_TOKENS=short lvm_serve",
    "unknown setting": "LVM_PROT=1 LVM_TOKENS=short lvm_serve",
    "is not set in": "LVM_REGISTRY=/tmp/empty lvm_serve",
    "not a symbolic link": "cp -rL artifacts/lvm /tmp/copy; LVM_REGISTRY=/tmp/copy lvm_serve",
    "expected a list of 5": "predict '{\"context\": [[1.0]]}'",
    "expected a list of 384": "predict '{\"context\": [[1, 2], [1, 2], [1, 2], [1, 2], [1, 2]]}'",
    "no_encoder": 'predict \'{"texts": ["a", "b", "c", "d", "e"]}\'',
    "unknown model": 'predict \'{"context": [], "model": "x"}\'',
    "unauthorised": 'command curl -s "$LVM_URL/models"',
    "unsupported_media_type": 'call -d @examples/context.json "$LVM_URL/predict"',
    "expired": "predict @examples/context.json -H 'X-Request-Timeout-Ms: 0.001'",
    "too_large": 'predict "{\\"contexts\\": [$(printf \'[],%.0s\' {1..1024}) []]}"',
    "no version": "lvm promote primary x",
    "kind net": "lvm promote retriever amn",
    "must be a string": "lvm data misspelt.jsonl /tmp/bad",
    "exists": "mkdir my-data; lvm data examples/articles.jsonl my-data",
    "No module named": "PYTHONPATH=hidden lvm train gmn --data my-data",
}

# Messages whose causes take seconds, each with the file that has it.
SOURCES: Mapping[str, str] = {
    "has scores on": "models/gate.py",
    "less, tolerated: ": "models/gate.py",
    "of CPU time for a batch of": "models/gate.py",
    "the file says it is": "models/training/torch_import.py",
    "not a torch checkpoint, or damaged": "models/training/safe_torch_load.py",
    "they differ by more than": "models/training/stated.py",
    "the model reads D =": "models/windows.py",
    "no article has more than": "models/windows.py",
}


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = Clone(tmp_path)
    yield made
    made.stop()


def follow(tutorial: str, clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    """Do what a tutorial says, in its order."""
    names: dict[str, Any] = {}
    for block in blocks.read(TUTORIALS / tutorial):
        if block.language == "sh":
            clone.run(block, NOT_RUN)
        elif block.language == "python":
            clone.execute(block, names, capsys)


@pytest.mark.parametrize("tutorial", ["my-articles.md", "my-checkpoint.md", "text-search.md"])
def test_a_tutorial_does_what_it_shows(
    tutorial: str, clone: Clone, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone.root)
    follow(tutorial, clone, capsys)


def test_the_service_answers_behind_the_configuration_of_nginx(
    clone: Clone, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone.root)
    monkeypatch.setenv("LVM_TOKEN", TOKEN)
    (clone.root / ".venv/bin/openssl").write_text(f"#!/bin/sh\necho {TOKEN}\n")
    (clone.root / ".venv/bin/openssl").chmod(0o755)
    port = free_port()
    clone.addresses |= {PROXY: f"127.0.0.1:{port}", BEHIND: clone.url.removeprefix("http://")}
    found = re.search(r"```nginx\n(.*?)```", (TUTORIALS / "nginx.md").read_text(), re.DOTALL)
    assert found
    with running_proxy(clone.here(found[1]), clone.root, port):
        follow("nginx.md", clone, capsys)
        pages = clone.shell(f"curl -s http://{PROXY}/lvm/ http://{PROXY}/lvm/docs").stdout
    assert "swagger" in pages
    assert not re.search(r'(?:href|src)="/', pages)


def test_the_messages_of_troubleshooting_are_real(clone: Clone, capsys: pytest.CaptureFixture[str]) -> None:
    _bring_mistakes(clone.root)
    clone.environment |= {"LVM_ENCODER": "none", "LVM_TOKENS": f"app:{TOKEN}", "LVM_TOKEN": TOKEN}
    assert not clone.shell("lvm data examples/articles.jsonl my-val && lvm serve").returncode
    follow("troubleshooting.md", clone, capsys)
    for message, cause in _provoked():
        done = clone.shell(SERVING + cause)
        printed = done.stdout + done.stderr
        assert re.search(blocks.pattern(message), printed), f"{message}: {printed}"


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    for part, source in SOURCES.items():
        assert part in (ROOT / source).read_text(), part


def test_every_message_of_troubleshooting_is_tested() -> None:
    for message in messages():
        assert any(part in message for part in (*CAUSES, *SOURCES)), message
    for part in (*CAUSES, *SOURCES):
        assert any(part in message for message in messages()), part


def _provoked() -> Iterator[tuple[str, str]]:
    """Yield the messages that a script provokes, each with its script."""
    for message in messages():
        yield from ((message, script) for part, script in CAUSES.items() if part in message)


def messages() -> list[str]:
    """Return the messages in the first column of the tables, but for those of other programs."""
    text = (TUTORIALS / "troubleshooting.md").read_text()
    found = re.findall(r"^\| (`+)(?: ?)(.*?)(?: ?)\1 \|", text, re.MULTILINE)
    return [message for _, message in found if message != "requires a different Python"]


def _bring_mistakes(root: Path) -> None:
    """Make the files that the messages are about."""
    (root / "misspelt.jsonl").write_text('{"titel": "x"}\n')
    (root / "hidden").mkdir()
    (root / "hidden/torch.py").write_text('raise ModuleNotFoundError("No module named \'torch\'", name="torch")')
