"""`lvm shadow report` says if there is no candidate, and what it compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from lvm.cli import shadow
from lvm.cli.exit_codes import FAILED
from models.registry.registry import Registry
from service.app import create_app
from service.settings import Settings
from tests.conftest import Running, running, until
from tests.fakes import FakeLoader, mean_of, registry_of


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Running]:
    settings = Settings(registry=registry_of(tmp_path, primary="amn").root, reload_s=0.05)
    with running(create_app(settings, FakeLoader(amn=mean_of, gru=mean_of)), settings) as service:
        yield service


def report(url: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    capsys.readouterr()
    shadow.report(url, as_json=True)
    found = capsys.readouterr()
    return found.out, found.err


def test_without_a_candidate_it_says_how_to_set_one(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end:
        report(served.url, capsys)
    found = capsys.readouterr()
    assert (end.value.exit_code, found.out) == (FAILED, "")
    assert "has no candidate" in found.err
    assert "`lvm promote candidate VERSION` sets one" in found.err


def test_a_candidate_is_named_and_that_nothing_was_compared_yet(
    served: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    deployments = served.app.state.deployments
    registry = Registry(deployments.registry.root)
    registry.point("candidate", registry.resolve("primary"))
    until(lambda: "candidate" in deployments.slots, "the candidate")
    out, err = report(f"{served.url}/", capsys)
    found = json.loads(out)
    assert (found["candidate"], found["compared"], found["cosine"]) == (registry.resolve("primary").id, 0, None)
    assert "nothing was compared yet" in err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[", "nonsense"])
def test_an_address_without_a_service_fails(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end:
        shadow.report(url)
    assert end.value.exit_code == FAILED
    assert f"no metrics from {url}" in capsys.readouterr().err
