"""Replicas side by side: who serves what, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer

from lvm.cli import listing, replicas, versions
from lvm.cli.exit_codes import FAILED
from models.registry.registry import Registry
from service.app import create_app
from service.settings import Settings
from tests.conftest import Running, running, until
from tests.fakes import FakeLoader, add_version, mean_of, registry_of

Start = Callable[..., Running]
TOKEN = "a-token-of-16-characters-and-more"
NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Start]:
    """Return a function that serves fakes from a registry of their own."""
    with ExitStack() as stack:

        def start(name: str) -> Running:
            root = registry_of(tmp_path / name, primary="amn").root
            settings = Settings(registry=root, reload_s=0.05, tokens=TOKEN)  # type: ignore[arg-type]
            app = create_app(settings, FakeLoader(amn=mean_of, gru=mean_of))
            return stack.enter_context(running(app, settings))

        yield start


def test_shows_replicas_that_differ_or_do_not_answer(replica: Start) -> None:
    one, other = replica("one"), replica("other")
    found = replicas.fetch([one.url, other.url], TOKEN)
    assert [each.error for each in found] == [None, None]
    assert replicas.differing(found) == {}
    registry = Registry(other.app.state.deployments.registry.root)
    amn, gru = registry.resolve("primary"), add_version(registry, "gru")
    registry.point("primary", gru)
    until(lambda: replicas.fetch([other.url], TOKEN)[0].served("primary") == gru.id, "the promotion")
    found = replicas.fetch([one.url, other.url, NOBODY], TOKEN)
    assert replicas.differing(found) == {"primary": {one.url: amn.id, other.url: gru.id}}
    *served, away = replicas.rows(found)
    assert [(row[0], row[1], row[2], row[-1]) for row in served] == [
        ("primary", one.url, amn.id, "differs"),
        ("primary", other.url, gru.id, "differs"),
    ]
    assert served[0][3:5] == ("", listing.first_score(found[0].version("primary"))[1])
    assert [row[:2] for row in replicas.narrow_rows(found[:1])] == [("primary", amn.id.replace("/", "\n"))]
    assert [row[0] for row in replicas.narrow_rows(found)] == [f"primary\n{one.url}", f"primary\n{other.url}"]
    assert list(replicas.notes(found)) == [f"{NOBODY}: {away[-1]}"]
    assert away[1:3] == (NOBODY, "")
    assert away[-1].startswith("no answer: ConnectError")


def test_the_command_shows_replicas_and_checks_them(replica: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = replica("one")
    urls = [server.url, f"{server.url}/"]
    capsys.readouterr()  # what the server said in starting
    versions.models(urls, check=True, token=TOKEN, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [each["error"] for each in found["replicas"]] == [None, None]
    versions.models(urls, token=TOKEN)
    assert server.app.state.deployments.slots["primary"].deployed.version in capsys.readouterr().out
    with pytest.raises(typer.Exit) as end:
        versions.models(urls, check=True)
    assert end.value.exit_code == FAILED
    assert "no answer: HTTPStatusError" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter):
        versions.models(check=True)


def test_another_service_is_not_a_replica(replica: Start) -> None:
    server = replica("one")
    (found,) = replicas.fetch([f"{server.url}/readyz?"], TOKEN)
    assert found.error is not None


def test_a_warning_about_inputs_is_a_note() -> None:
    state = {"id": "amn/1", "since": "2026-11-30T15:53:09+00:00", "breaker": "closed", "warning": "inputs look odd"}
    found = replicas.Replica("http://a", {"primary": state}, versions={"amn/1": {"bytes": 5000, "scores": {}}})
    assert list(replicas.rows([found])) == [
        ("primary", "http://a", "amn/1", "", "5.0 kB", state["since"], "closed", "inputs look odd")
    ]
    assert list(replicas.narrow_rows([found])) == [("primary", "amn\n1", "\n5.0 kB", "2026-11-30\n15:53:09")]
    assert list(replicas.notes([found])) == ["primary at http://a: inputs look odd"]


def test_the_live_score_of_what_is_served_is_a_note() -> None:
    score = {"alias": "primary", "id": "amn/1", "pairs": 1200, "cosine": 0.58664, "interval": [0.5834, 0.5899]}
    state = {"id": "amn/1", "since": "2026-11-30T15:53:09+00:00", "breaker": "closed", "warning": None}
    found = replicas.Replica("http://a", {"primary": state}, live={"primary": score})
    assert list(replicas.notes([found])) == [
        "primary at http://a: live cosine 0.5866 (0.5834 to 0.5899), 1200 contexts"
    ]
