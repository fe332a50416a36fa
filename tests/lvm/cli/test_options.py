"""The options of a command come from a dataclass: names, defaults, bounds, and values of the fields' types."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from lvm.cli.options import options_from
from models.recipe import DataSet, Option


@dataclass(frozen=True)
class Inner:
    steps: Annotated[int, Option("Steps.", min=1)] = 3
    hidden: int = 7


@dataclass(frozen=True, kw_only=True)
class Outer:
    what: Annotated[str, Option("What.", is_argument=True)]
    data: Annotated[DataSet, Option("Data.")]
    more: Annotated[tuple[DataSet, ...], Option("More data.", flag="--also")] = ()
    sizes: Annotated[Mapping[str, Any], Option("Sizes.")] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    two_words: Annotated[bool, Option("A flag.")] = False


@dataclass(frozen=True, kw_only=True)
class Several:
    data: Annotated[tuple[DataSet, ...], Option("Data sets, at least one.")]


@pytest.fixture
def given() -> list[tuple[Outer, bool]]:
    """What the command was called with."""
    return []


@pytest.fixture
def app(given: list[tuple[Outer, bool]]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @options_from(Outer, {})
    def command(outer: Outer, last: Annotated[bool, typer.Option("--last")] = False) -> None:
        given.append((outer, last))

    return app


def run(app: typer.Typer, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.output


def test_an_option_that_is_repeated_and_has_no_default_is_required() -> None:
    app, given = typer.Typer(), list[Several]()
    app.command()(options_from(Several, {})(given.append))
    assert run(app)[0] == 2
    assert run(app, "--data", "a=one", "--data", "two")[0] == 0
    assert given == [Several(data=(DataSet("a", Path("one")), DataSet("two", Path("two"))))]


def test_defaults_are_those_of_the_dataclass(app: typer.Typer, given: list[tuple[Outer, bool]]) -> None:
    assert run(app, "net", "--data", "dir")[0] == 0
    assert given == [(Outer(what="net", data=DataSet("dir", Path("dir"))), False)]


def test_values_have_the_types_of_the_fields(app: typer.Typer, given: list[tuple[Outer, bool]]) -> None:
    words = ["net", "--data", "a=one", "--also", "b=two", "--also", "three", "--sizes", '{"dim": 3}']
    assert run(app, *words, "--steps", "5", "--two-words", "--last")[0] == 0
    expected = Outer(
        what="net",
        data=DataSet("a", Path("one")),
        more=(DataSet("b", Path("two")), DataSet("three", Path("three"))),
        sizes={"dim": 3},
        inner=Inner(steps=5),
        two_words=True,
    )
    assert given == [(expected, True)]


@pytest.mark.parametrize(
    "words",
    [("net",), ("--data", "dir"), ("net", "--data", "dir", "--steps", "0"), ("net", "--data", "dir", "--hidden", "1")],
)
def test_rejects_what_the_fields_do_not_allow(app: typer.Typer, given: list[Any], words: tuple[str, ...]) -> None:
    assert run(app, *words)[0] == 2
    assert given == []


def test_rejects_sizes_that_are_not_a_json_object(app: typer.Typer, given: list[Any]) -> None:
    for text in ("[]", "{"):
        assert run(app, "net", "--data", "dir", "--sizes", text)[0] == 2
    assert given == []
