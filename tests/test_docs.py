"""The documentation says what is: its commands exist, its tables are the code's, its files are there."""

from __future__ import annotations

import json
import re
import subprocess
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
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "NOTICE")]
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
CURLS = [line for line in SHELL.splitlines() if line.startswith("curl")]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_lvm_command_of_the_readme_exists_with_its_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"^lvm (\S+)(.*?)(?:#.*)?$", SHELL, re.MULTILINE)
    assert {name for name, _ in used} == commands.keys() - {"serve"}
    for name, rest in used:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, name


def test_every_make_target_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"`?make ([a-z-]+)", document.read_text())) <= targets | {"of"}


def test_the_settings_table_is_the_code() -> None:
    def default(value: object) -> str:
        return ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)

    rows = re.findall(r"^\| `(LVM_\w+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    expected = [
        (f"LVM_{name.upper()}", "all cores" if name == "threads" else default(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert rows == expected


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
            assert (ROOT / link).exists() or urlsplit(link).scheme, link


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
