"""The documentation says what is: its commands exist, its tables are the code's, its files are there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import typer

from lvm import AsyncClient, errors
from lvm.cli import app
from models.registry.card import Card
from models.registry.registry import Registry
from service.app import create_app
from service.settings import Settings
from service.telemetry.metrics import (
    REASONS,
    RELOADS,
    STAGES,
    Metrics,
)
from tests.conftest import ROOT, SHIPPED

README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "NOTICE", *ROOT.glob("docs/**/*.md")]
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
API, METRICS, OPERATIONS = ((ROOT / f"docs/{name}.md").read_text() for name in ("api", "metrics", "operations"))
LEADERBOARD = (SHIPPED / "LEADERBOARD.md").read_text()
WORDS = re.compile(r"\w+")
ELSEWHERE = {"unknown_route", "method_not_allowed"}  # reasons of FastAPI's errors, which have no class here


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n(?:\n|(?=[-|] ?))", prose):
        assert len(paragraph) <= 400, paragraph


def test_the_first_screen_of_the_readme_shows_an_answer() -> None:
    assert "```json" in "\n".join(README.splitlines()[:40])


def test_every_lvm_command_of_the_readme_exists_with_its_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"^lvm (\S+)(.*?)(?:#.*)?$", SHELL, re.MULTILINE)
    assert {name for name, _ in used} == {name for name in commands if not commands[name].hidden} - {"serve"}
    for name, rest in used:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z][a-z0-9-]*", rest)) <= known, name


def test_every_make_target_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(), re.MULTILINE)) <= targets


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
    rows = _figures()
    for card in (card for card in cards if card.kind == "net"):
        figures = [f"{card.parameters:,}", *(f"{card.scores[data]['cosine']:.4f}" for data in ("wiki/val", "ood_peps"))]
        assert rows[card.name][:3] == figures


def test_the_score_table_is_what_the_leaderboard_says() -> None:
    accuracy, domains, retrieval = (
        _leaderboard(heading)
        for heading in ("## 1 Accuracy and latency", "## In and out of distribution", "## Retrieval, wiki/val")
    )
    rows = _figures()
    assert len(rows) == len(accuracy) + 1
    assert rows.pop("/retrieve")[3] == retrieval["wiki-val, reranked"][3]
    for system, (_, in_domain, out_of_domain, found, milliseconds) in rows.items():
        assert in_domain == accuracy[system][2]
        assert abs(float(out_of_domain) - float(domains[system][3])) < 0.00015
        assert found == retrieval[system][3]
        assert milliseconds == accuracy[system][5] or float(milliseconds) == round(float(accuracy[system][5]), 2)


def _figures() -> dict[str, list[str]]:
    """Return the cells of the README's table of figures by the system's name, as the leaderboard has it."""
    table = README.partition("| system | parameters |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    names = [re.sub(r"^baseline: | \(.*\)|:.*$|`", "", row[0]).replace(" ", "_").lower() for row in cells]
    return {name: row[1:] for name, row in zip(names, cells, strict=True)}


def _leaderboard(heading: str) -> dict[str, list[str]]:
    """Return the cells of the first table below a heading of the leaderboard, by the name of the system."""
    section = LEADERBOARD.partition(heading)[2].partition("\n## ")[0].partition("\n| --- ")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[1:]]
    return {next(cell for cell in row if not cell.isdigit()): row for row in cells}


def test_files_and_links_of_the_documents_are_there() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists() or urlsplit(link).scheme, link


def test_anchors_of_the_documents_are_headings() -> None:
    for document in DOCUMENTS:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", document.read_text()):
            if not urlsplit(link).scheme:
                assert anchor in _anchors(document.parent / link if link else document), (
                    f"{document.name}: {link}#{anchor}"
                )


def _anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_claim_of_the_security_document_names_tests_that_are_there() -> None:
    claims = (ROOT / "SECURITY.md").read_text().partition("| claim | test |\n|---|---|\n")[2].partition("\n\n")[0]
    for claim in claims.splitlines():
        named = re.findall(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)`", claim)
        assert named, claim
        assert all(f"def {test}(" in (ROOT / file).read_text() for file, test in named), claim


def test_the_metrics_table_is_the_code() -> None:
    rows = re.findall(r"^\| `(lvm_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", METRICS, re.MULTILINE)
    assert rows == [
        (
            made.name + ("_total" if made.kind == "counter" else ""),
            made.kind,
            ", ".join(f"`{label}`" for label in made.label_names),
            made.help_text,
        )
        for made in Metrics().instruments()
    ]


def test_the_label_values_of_the_metrics_are_all_named() -> None:
    named = [
        set(re.findall(r"`(\w+)`", values)) for values in re.findall(r"^\| `.*?` .*?\| (.*) \|$", METRICS, re.MULTILINE)
    ]
    for values in (RELOADS, REASONS, {stage for stages in STAGES.values() for stage in stages}):
        assert set(values) in named


def test_the_errors_table_is_the_code() -> None:
    rows = {(int(status), reason) for status, reason in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", API, re.MULTILINE)}
    classes = {errors.ServiceError, *_below(errors.ServiceError)}
    assert {row for row in rows if row[1] not in ELSEWHERE} == {
        (error.status, error.reason) for error in classes if error.__module__ == errors.__name__
    }


def test_the_table_of_calls_is_the_client() -> None:
    table = (ROOT / "docs/client.md").read_text().partition("## Calls")[2].partition("\nEvery answer")[0]
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \|", table, re.MULTILINE)
    assert {*rows, "close"} == {name for name in vars(AsyncClient) if not name.startswith("_")}
    options = {option for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for option in WORDS.findall(row)}
    calls = (inspect.signature(getattr(AsyncClient, name)) for name in rows)
    assert {option for call in calls for option in call.parameters} - {"self"} <= options


def _below(kind: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def test_every_route_is_documented_and_every_documented_route_exists() -> None:
    routes = re.findall(r"^\| `(GET|POST) (/\S*)` \|", API, re.MULTILINE)
    known = {(method, path) for path, item in create_app(Settings()).openapi()["paths"].items() for method in item}
    pages = {("get", "/"), ("get", "/docs"), ("get", "/openapi.json")}
    assert {(method.lower(), path) for method, path in routes} - known == pages
    assert known <= {(method.lower(), path) for method, path in routes}


def test_every_event_of_the_log_is_documented() -> None:
    code = "".join(path.read_text() for path in ROOT.glob("service/**/*.py"))
    events = re.findall(r"logger\(\)\.(\w+)\(\s*\"([^\"]+)\"", code)
    rows = re.findall(r"^\| `([a-z ]+)` \| (info|warning|error) \|", OPERATIONS, re.MULTILINE)
    assert {(event, level) for event, level in rows} == {(event, level) for level, event in events}
