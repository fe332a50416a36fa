"""The documentation says what is: its commands exist, its tables are the code's, its files are there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer

from models.card import Card
from models.registry import Registry
from service.cli import app
from service.settings import Settings
from tests.conftest import ROOT, SHIPPED, Process

README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "NOTICE", *ROOT.glob("docs/*.md")]
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CURLS = [line for line in SHELL.splitlines() if line.startswith("curl")]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_lvm_command_of_the_readme_exists_with_its_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"^lvm (\S+)(.*?)(?:#.*)?$", SHELL, re.MULTILINE)
    assert {name for name, _ in used} == {name for name in commands if not commands[name].hidden} - {"serve"}
    for name, rest in used:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, name


def test_every_make_target_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"`?make ([a-z-]+)", document.read_text())) <= targets | {"of"}


def test_the_settings_table_is_the_code() -> None:
    def default(value: object) -> str:
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: "none"}[value]
        return ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)

    def rows(text: str) -> list[tuple[str, str, str]]:
        return re.findall(r"^\| `(LVM_\w+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)

    expected = [
        (f"LVM_{name.upper()}", "all cores" if name == "threads" else default(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert rows((ROOT / "docs/settings.md").read_text()) == expected
    assert set(rows(README)) <= set(expected)


def test_the_score_table_is_what_the_cards_say() -> None:
    versions = Registry(SHIPPED).versions()
    cards = [Card.from_markdown((version.path / "README.md").read_text()) for version in versions]
    for card in (card for card in cards if card.kind == "net"):
        row = next(line for line in README.splitlines() if re.match(rf"\| {card.name.upper()} (\(|\|)", line))
        figures = [f"{card.parameters:,}", *(f"{card.scores[data]['cosine']:.4f}" for data in ("wiki/val", "ood_peps"))]
        assert [cell.strip() for cell in row.split("|")[2:5]] == figures


def test_files_and_links_of_the_documents_are_there() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists() or urlsplit(link).scheme, link


def test_every_claim_of_the_security_document_names_tests_that_are_there() -> None:
    claims = (ROOT / "SECURITY.md").read_text().partition("| claim | test |\n|---|---|\n")[2].partition("\n\n")[0]
    for claim in claims.splitlines():
        named = re.findall(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)`", claim)
        assert named, claim
        assert all(f"def {test}(" in (ROOT / file).read_text() for file, test in named), claim


@pytest.mark.parametrize("curl", CURLS)
def test_the_curls_of_the_readme_answer_as_it_says(process: Callable[..., Process], tmp_path: Path, curl: str) -> None:
    server = process(LVM_TIMEOUT_MS="60000")  # opening the encoder takes a slow machine more than two seconds
    command = curl.replace("http://127.0.0.1:8000", server.url).replace("/tmp/vector.f32", str(tmp_path / "vector.f32"))
    out = subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, capture_output=True).stdout
    if "-o" in curl.split():
        assert len((tmp_path / "vector.f32").read_bytes()) == 4 * 384
        return
    body = json.loads(out)
    if curl.endswith("/predict"):
        assert f'"version": "{body["version"]}"' in README
        assert f"[{', '.join(f'{x:.4f}' for x in body['vector'][:3])}, ..." in README
    else:
        assert f'"id": {body["results"][0]["id"]}' in README
        assert body["results"][0]["text"][:60] in README


@pytest.mark.parametrize("snippet", PYTHON)
def test_the_python_of_the_readme_runs_as_written(process: Callable[..., Process], snippet: str) -> None:
    code = snippet.replace("http://127.0.0.1:8000", process().url)
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert out.stdout.startswith("(384,) ['Rabbit'")
