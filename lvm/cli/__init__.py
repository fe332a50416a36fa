"""The `lvm` command line: the table of its commands, with examples. Data on stdout, messages on stderr."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn

import typer

from lvm.cli import build, exit_codes, index, measure, serving, shadow, versions

# by name: the function of a command, and examples
Commands = Mapping[str, tuple[Callable[..., None], tuple[str, ...]]]
SERVE: Commands = {
    "serve": (
        serving.serve,
        (
            "lvm serve --workers 4",
            "lvm serve --registry my-registry --device cpu --text",
            "lvm serve --host 0.0.0.0 --tokens-file tokens",
            "lvm serve --ray --workers 4",
        ),
    ),
    "smoke": (serving.smoke, ("lvm smoke http://127.0.0.1:8000 --version amn",)),
}
SHADOW: Commands = {"report": (shadow.report, ("lvm shadow report http://127.0.0.1:8000",))}
VERSIONS: Commands = {
    "models": (
        versions.models,
        ("lvm models", "lvm models --url http://127.0.0.1:8000"),
    ),
    "promote": (
        versions.promote,
        (
            'lvm promote primary gmn --why "more accurate"',
            "lvm promote candidate lstm",
            "lvm promote retriever wiki-val",
        ),
    ),
    "rollback": (versions.rollback, ('lvm rollback primary --why "answers drift"',)),
    "unset": (versions.unset, ('lvm unset candidate --why "compared"',)),
    "push": (versions.push, ("lvm push s3://bucket/prefix",)),
    "import": (versions.import_, ("lvm import epoch_20.pt --name amn --encoder all-MiniLM-L6-v2 --data NAME=DIR",)),
}
BUILD: Commands = {
    "data": (
        build.data,
        (
            "lvm data articles.jsonl my-data",
            "zcat articles.jsonl.gz | lvm data - my-data",
            "lvm data vectors.npz my-data --encoder all-MiniLM-L6-v2",
        ),
    ),
    "train": (
        build.train,
        (
            "lvm train gmn --data my-data --val my-val",
            "lvm train gmn --data my-data --data more-data --resume",
        ),
    ),
    "overlap": (build.overlap, ("lvm overlap my-val my-data more-data",)),
    "corpus": (
        build.corpus,
        ("lvm corpus my-corpus --data my-data", "lvm corpus my-corpus --data my-val --towers retriever"),
    ),
}
INDEX: Commands = {"push": (index.push, ("LVM_MILVUS_URI=http://milvus:19530 lvm index push",))}
MEASURE: Commands = {
    "evaluate": (
        measure.evaluate,
        ("lvm evaluate primary --data artifacts/lvm/retriever", "lvm evaluate gmn --data my-data --sample 1000"),
    ),
    "diagnose": (measure.diagnose, ("lvm diagnose primary --data artifacts/lvm/retriever --plot diagnosis.png",)),
    "leaderboard": (measure.leaderboard, ("lvm leaderboard --data wiki/val=DIR --ood ood_peps=DIR",)),
    "bench": (measure.bench, ("lvm bench", "lvm bench --only nets --rounds 3")),
    "plan": (
        measure.plan,
        ("lvm plan --rate 5000 --p99 50", "lvm plan --rate 1e6 --p99 100 --vectors 1e9 --cores 64"),
    ),
}
FIRST_STEPS = ("lvm serve", "lvm models", "lvm promote primary gmn", "lvm rollback primary")


def _examples(lines: tuple[str, ...]) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _add(to: typer.Typer, commands: Commands, panel: str | None = None) -> None:
    for name, (command, examples) in commands.items():
        text = _unwrapped(command)
        to.command(name, help=text, rich_help_panel=panel, epilog=_examples(examples))(command)


def _unwrapped(command: Callable[..., None]) -> str:
    """Return the docstring of a command, each paragraph in one line, so that a terminal wraps it."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_examples(FIRST_STEPS),
)
indexes = typer.Typer(help="Keep a corpus in a vector database.", no_args_is_help=True)
shadows = typer.Typer(help="Compare the candidate with what callers got.", no_args_is_help=True)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(version("lvm-serve"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve, train, evaluate and promote latent vector models."""


_add(app, SERVE, "Serve")
app.add_typer(shadows, name="shadow", rich_help_panel="Serve")
_add(shadows, SHADOW)
_add(app, VERSIONS, "Versions")
_add(app, BUILD, "Data and training")
app.add_typer(indexes, name="index", rich_help_panel="Data and training")
_add(indexes, INDEX)
_add(app, MEASURE, "Measure")
app.command("work", hidden=True)(serving.run_worker)
app.command("own", hidden=True)(serving.run_device_worker)


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    exit_codes.run(app)


__all__: Any = ["app", "main"]
