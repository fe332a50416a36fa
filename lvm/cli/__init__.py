"""The `lvm` command line: the table of its commands, with examples. Data on stdout, messages on stderr."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn

import typer

from lvm.cli import build, exit_codes, index, measure, serving, shadow, versions

# by name: the function of a command, and examples
Commands = Mapping[str, tuple[Callable[..., None], tuple[str, ...]]]
SERVE: Commands = {
    "serve": (
        serving.serve,
        ("lvm serve --workers 4", "lvm serve --ray --workers 4", "LVM_TOKENS_FILE=tokens lvm serve --host 0.0.0.0"),
    ),
    "smoke": (serving.smoke, ("lvm smoke http://127.0.0.1:8000 --version amn",)),
}
VERSIONS: Commands = {
    "models": (
        versions.models,
        ("lvm models", "lvm models --url http://10.0.0.1:8000 --url http://10.0.0.2:8000"),
    ),
    "promote": (versions.promote, ('lvm promote primary gmn --why "more accurate"',)),
    "rollback": (versions.rollback, ('lvm rollback primary --why "answers drift"',)),
    "unset": (versions.unset, ('lvm unset candidate --why "compared"',)),
    "push": (versions.push, ("lvm push s3://bucket/prefix",)),
    "import": (versions.import_, ("lvm import epoch_20.pt --name amn --encoder all-MiniLM-L6-v2 --data NAME=DIR",)),
}
SHADOW: Commands = {"report": (shadow.report, ("lvm shadow report http://127.0.0.1:8000",))}
INDEX: Commands = {"push": (index.push, ("LVM_MILVUS_URI=http://milvus:19530 lvm index push",))}
BUILD: Commands = {
    "data": (build.data, ("lvm data articles.jsonl my-data", "zcat articles.jsonl.gz | lvm data - my-data")),
    "train": (build.train, ("lvm train gmn --data my-data --val my-val", "lvm train gmn --data my-data --resume")),
    "corpus": (build.corpus, ("lvm corpus my-corpus --data my-val --towers retriever",)),
}
MEASURE: Commands = {
    "evaluate": (measure.evaluate, ("lvm evaluate primary --data artifacts/lvm/retriever",)),
    "diagnose": (measure.diagnose, ("lvm diagnose primary --data artifacts/lvm/retriever --plot diagnosis.png",)),
    "leaderboard": (measure.leaderboard, ("lvm leaderboard --data wiki/val=DIR --ood ood_peps=DIR",)),
    "bench": (measure.bench, ("lvm bench", "lvm bench --only nets --rounds 3")),
    "plan": (
        measure.plan,
        ("lvm plan --rate 5000 --p99 50", "lvm plan --rate 1e6 --p99 100 --vectors 1e9 --cores 64"),
    ),
}
FIRST_STEPS = ("lvm serve", "lvm models", "lvm promote primary VERSION --why TEXT", "lvm rollback primary")


def _examples(lines: tuple[str, ...]) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _add(to: typer.Typer, commands: Commands, panel: str | None = None) -> None:
    for name, (command, examples) in commands.items():
        to.command(name, rich_help_panel=panel, epilog=_examples(examples))(command)


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
_add(app, VERSIONS, "Versions and aliases")
app.add_typer(shadows, name="shadow", rich_help_panel="Versions and aliases")
_add(shadows, SHADOW)
app.add_typer(indexes, name="index", rich_help_panel="Versions and aliases")
_add(indexes, INDEX)
_add(app, BUILD, "Build")
_add(app, MEASURE, "Measure")
app.command("work", hidden=True)(serving.run_worker)
app.command("own", hidden=True)(serving.run_device_worker)


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    exit_codes.run(app)


__all__: Any = ["app", "main"]
