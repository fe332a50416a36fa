"""`lvm`: thin commands that call down. Data on stdout, messages on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from models.registry import ALIASES, Move, Registry, RegistryError

OK, FAILED, USAGE, BAD_CHECKPOINT, CANNOT_CREATE, CANNOT_WRITE, LOCKED, BAD_CONFIG = (
    0,
    1,
    2,
    65,
    73,
    74,
    75,
    78,
)

app = typer.Typer(
    help="Serve, train, judge and promote latent vector models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SERVE, VERSIONS, MAKE = "Serve", "Versions and aliases", "Make and judge"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Alias = Annotated[str, typer.Argument(help="primary, fallback, candidate or retriever.")]
DataDir = Annotated[Path, typer.Option("--data", help="Directory of vectors.f16.npy, index.npy, articles.jsonl.gz.")]
Named = Annotated[str, typer.Argument(metavar="ALIAS|VERSION", help="An alias, name/version, or a version.")]
Url = Annotated[str, typer.Argument(help="Where the service listens.")]
Token = Annotated[str | None, typer.Option(envvar="LVM_TOKEN", help="Bearer token, where the service wants one.")]
Why = Annotated[str, typer.Option(help="The reason, for the ledger.")]
shadow = typer.Typer(help="What the candidate would have answered.")
app.add_typer(shadow, name="shadow", rich_help_panel=VERSIONS)


@app.command(rich_help_panel=SERVE)
def serve(
    host: Annotated[str | None, typer.Option(help="Address; default LVM_HOST or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port, 0 picks one; default LVM_PORT or 8000.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond loopback though no LVM_TOKENS are set.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Serving processes; default LVM_WORKERS or 1.")] = None,
) -> None:
    """Serve what the aliases point at, until SIGTERM; SIGHUP renews the workers where there are several."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's products are small here: a second thread only spins
    from service.server import serve as run
    from service.settings import read_settings
    from service.workers import supervise

    given = {"host": host, "port": port, "insecure": insecure, "workers": workers}
    settings = read_settings(**{name: value for name, value in given.items() if value is not None})
    raise typer.Exit(run(settings) if settings.workers == 1 else supervise(settings))


@app.command(hidden=True)
def work(slot: int, listener: int, line: int, home: Path) -> None:
    """Be one of several workers; `serve` starts them."""
    from service.workers import work as run

    raise typer.Exit(run(slot, listener, line, home))


@app.command(rich_help_panel=VERSIONS)
def models(as_json: AsJson = False) -> None:
    """Show the versions, their scores, and which alias serves which."""
    from service.inventory import summary

    registry = _existing_registry()
    aliases = registry.aliases()
    versions = [summary(version) for version in registry.versions()]
    if as_json:
        _print_json({"registry": str(registry.root), "aliases": aliases, "versions": versions})
        return
    rows = [
        (
            version["id"],
            ", ".join(alias for alias, target in aliases.items() if target == version["id"]),
            version.get("architecture") or version.get("kind", ""),
            str(version.get("dim", "")),
            f"{version['parameters']:,}" if version.get("parameters") else "",
            ", ".join(f"{data} {s['cosine']:.4f}" for data, s in version.get("scores", {}).items()),
        )
        for version in versions
    ]
    _print_table(("version", "alias", "net", "D", "parameters", "cosine"), rows)


@app.command(rich_help_panel=VERSIONS)
def promote(
    alias: Alias,
    version: Named,
    why: Why = "",
    data: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DIR", help="A data set on its card, to score it on; repeat.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Against all objections but damage; the ledger wants to know --why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Point ALIAS at VERSION if it passes the gate; a running service follows within a second."""
    _check_alias(alias)
    if force and not why:
        raise typer.BadParameter("say --why: the ledger keeps what was overridden, and why", param_hint="--force")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as it is served
    from models import corpus as corpora
    from models import gate

    registry = _existing_registry()
    target = registry.find(version)
    sets = {name: corpora.read(directory) for name, directory in map(_named_dir, data or ())}
    verdict = gate.judge(registry, alias, target, sets)
    if verdict.objections and not force:
        raise gate.Refused(verdict.objections)
    for objection in verdict.objections:
        _say(f"overridden: {objection}")
    overrode = [f"{type(objection).__name__}: {objection}" for objection in verdict.objections]
    move = registry.point(alias, target, why=why, overrode=overrode, since=verdict.since)
    _print_move(move, as_json, verdict.figures)


@app.command(rich_help_panel=VERSIONS)
def rollback(alias: Alias, why: Why = "", as_json: AsJson = False) -> None:
    """Point ALIAS back at the version before; twice goes two back."""
    _check_alias(alias)
    _print_move(_existing_registry().rollback(alias, why=why), as_json)


@shadow.command()
def report(
    url: Url = "http://127.0.0.1:8000",
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Report how the answers of `candidate` compare with those that callers got."""
    import httpx

    from service.shadow import report as report_of

    try:
        scrape = httpx.get(f"{url}/metrics", headers=_bearer(token), timeout=10).raise_for_status().text
    except httpx.HTTPError as error:
        _say(f"no metrics from {url}: {error}")
        raise typer.Exit(FAILED) from error
    found = report_of(scrape)
    rows = {**found.pop("requests"), **found}
    if as_json:
        _print_json(rows)
    else:
        shown = [(name, "-" if value is None else f"{value:.6g}") for name, value in rows.items()]
        _print_table(("what", "value"), shown)


@app.command(rich_help_panel=SERVE)
def smoke(
    url: Url = "http://127.0.0.1:8000",
    version: Annotated[str | None, typer.Option(help="What `primary` must serve: name/version, or a version.")] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Check a released service from outside, in seconds; a line a check, fails where one does."""
    import httpx

    from service.smoke import Smoke, golden_of

    results = []
    with httpx.Client(base_url=url, headers=_bearer(token), timeout=10) as client:
        for result in Smoke(client, golden_of(_registry()), version).run():
            results.append(result)
            if not as_json:
                typer.echo(f"{result.outcome:<8}{result.check:<24}{result.milliseconds:8.1f} ms  {result.found}")
    is_ok = all(result.outcome != "failed" for result in results)
    if as_json:
        _print_json({"url": url, "ok": is_ok, "checks": [result._asdict() for result in results]})
    raise typer.Exit(OK if is_ok else FAILED)


@app.command("import", rich_help_panel=VERSIONS)
def import_(
    file: Annotated[Path, typer.Argument(help="What torch.save wrote.", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Option(help="amn, gru, lstm (either variant) or transformer.")],
    encoder: Annotated[str, typer.Option(help="The encoder whose vectors the net reads.")] = "unspecified",
    context_length: Annotated[int | None, typer.Option(help="T, where the file does not say; else 5.")] = None,
    license_: Annotated[str, typer.Option("--license", help="Licence of the weights.")] = "other",
    data: Annotated[Path | None, typer.Option(help="A data set to score it on, for its card.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a version of a customer's checkpoint, strictly, without running anything in it."""
    from models import corpus as corpora
    from models.card import Card
    from models.nets import architecture_of, config_dict
    from models.training import foreign, publish

    net = foreign.read_net(file, name, context_length)
    scored = {data.name: corpora.read(data)} if data else {}
    config = config_dict(net)
    golden = publish.golden_contexts(next(iter(scored.values()), None), config["dim"], config["context_length"])
    card = Card(
        name=architecture_of(net),
        kind="net",
        dim=config["dim"],
        encoder=encoder,
        license=license_,
        attribution="Imported; who trained it holds its rights.",
        command=f"lvm import {file.name} --name {name}",
        reference=publish.reference_of(scored[data.name]) if data else None,
        limits=("Imported: what it was trained on is not known here.",),
    )
    version = publish.publish(_registry(), net, card, golden, scored)
    _print_version(version, as_json)


@app.command(rich_help_panel=MAKE)
def data(
    source: Annotated[
        Path, typer.Argument(help='Lines of {"title", "text" or "chunks"} (.jsonl, .jsonl.gz), or .txt files.')
    ],
    out: Annotated[Path, typer.Argument(help="The data set to make; must not exist.")],
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model.")] = "all-MiniLM-L6-v2",
    allow_download: Annotated[bool, typer.Option(help="Let the encoder be fetched from its hub.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn articles into vectors: chunk at sentence ends, embed, store."""
    from dataclasses import asdict

    from models.encoder import SentenceTransformersEncoder
    from models.training import articles

    with _progress("encoding chunks") as progress:
        model = SentenceTransformersEncoder(encoder, allow_download=allow_download)
        summary = asdict(articles.build(source, out, model, progress))
    _print_json(summary) if as_json else _print_table(("what", "count"), [(k, str(v)) for k, v in summary.items()])


@app.command(rich_help_panel=MAKE)
def train(
    net: Annotated[str, typer.Argument(help="amn, gmn, gru, lstm, lstm_stack, mamba or transformer; or reranker.")],
    data: Annotated[str, typer.Option(metavar="[NAME=]DIR", help="Training set; NAME is for the card.")],
    val: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DIR", help="Data sets to score on, for the card; repeat.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; default the net's.")] = None,
    encoder: Annotated[str, typer.Option(help="The encoder of the data.")] = "all-MiniLM-L6-v2",
    config: Annotated[str, typer.Option(help="JSON of sizes other than the reference's.")] = "{}",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the windows.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 5e-4,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    noise: Annotated[float, typer.Option(help="Length of the noise added to each context vector.")] = 0.0,
    reverse: Annotated[float, typer.Option(min=0, max=1, help="Share of batches read backwards.")] = 0.0,
    teacher: Annotated[
        list[str] | None, typer.Option(metavar="ALIAS|VERSION", help="A version to learn from; repeat for an ensemble.")
    ] = None,
    distil: Annotated[float, typer.Option(min=0, max=1, help="Share of the target that the teachers say.")] = 0.5,
    schedule: Annotated[str, typer.Option(help="baseline (plateau) or optimised (warm-up, cosine).")] = "optimised",
    context_length: Annotated[int, typer.Option(min=1, help="T.")] = 5,
    held_out: Annotated[float, typer.Option(help="Share of the articles that choose the epoch.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of weights, order, noise and split.")] = 0,
    device: Annotated[str, typer.Option(help="Any torch device.")] = "cpu",
    run: Annotated[Path | None, typer.Option(help="Where the state goes; default runs/NAME.pt.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state of --run.")] = False,
    license_: Annotated[
        str, typer.Option("--license", help="Licence of the data, and so of the net.")
    ] = "cc-by-sa-3.0",
    attribution: Annotated[str, typer.Option(help="Whom the data's licence wants named.")] = "",
    two_tower: Annotated[
        bool, typer.Option("--two-tower", help="Train it as a query tower, with a payload tower, to retrieve.")
    ] = False,
    negatives: Annotated[int, typer.Option(min=1, help="Wrong chunks of the same article, for a two-tower.")] = 3,
    towers: Annotated[
        str | None, typer.Option(metavar="VERSION", help="The two-tower whose finds the reranker is to order.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a net, score it as it will be served, and store it as a version.

    A reranker learns from the articles of --data that its --towers held out.
    """
    from models.training.job import Job, run_job
    from models.training.rerank import RerankJob, run_rerank_job
    from models.training.train import Recipe

    if schedule not in ("baseline", "optimised"):
        raise typer.BadParameter("want baseline or optimised", param_hint="--schedule")
    if (net == "reranker") is not (towers is not None):
        raise typer.BadParameter("a reranker, and nothing else, has --towers", param_hint="--towers")
    if two_tower and (noise or reverse or teacher):
        raise typer.BadParameter("noise, reverse and teachers are for nets that predict", param_hint="--two-tower")
    state = run or Path("runs") / f"{name or net}.pt"
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,  # type: ignore[arg-type]  # checked above
        negatives=negatives,
        noise=noise,
        reverse=reverse,
        teachers=tuple(_existing_registry().find(version).id for version in teacher) if teacher else (),
        distil=distil,
        seed=seed,
    )
    if towers is not None:
        order = RerankJob(
            name=name or net,
            towers=_existing_registry().find(towers),
            data=_named_dir(data),
            config=_json_option(config),
            recipe=recipe,
            state=state,
            license=license_,
            attribution=attribution,
            command=_command_line(),
        )
        with _progress("training a reranker") as progress:
            _print_version(run_rerank_job(order, _registry(), progress, _say), as_json)
        return
    job = Job(
        net=net,
        name=name or net,
        config=_json_option(config),
        recipe=recipe,
        data=_named_dir(data),
        validate=tuple(map(_named_dir, val or ())),
        encoder=encoder,
        context_length=context_length,
        held_out=held_out,
        device=device,
        state=state,
        resume=resume,
        license=license_,
        attribution=attribution,
        command=_command_line(),
        two_tower=two_tower,
    )
    with _progress(f"training {net}") as progress:
        version = run_job(job, _registry(), progress, _say)
    _print_version(version, as_json)


@app.command(rich_help_panel=MAKE)
def corpus(
    name: Annotated[str, typer.Argument(help="The corpus's name in the registry.")],
    data: DataDir,
    encoder: Annotated[str, typer.Option(help="The encoder of the data.")] = "all-MiniLM-L6-v2",
    license_: Annotated[str, typer.Option("--license", help="Licence of the text.")] = "cc-by-sa-3.0",
    attribution: Annotated[str, typer.Option(help="Whom the licence wants named.")] = "",
    index: Annotated[
        Literal["auto", "flat", "ivf"],
        typer.Option(help="flat: exact; ivf: approximate, files stay on disk; auto: ivf for large corpora."),
    ] = "auto",
    towers: Annotated[
        str | None, typer.Option(metavar="ALIAS|VERSION", help="A two-tower, or a bundle, to make it a bundle with.")
    ] = None,
    reranker: Annotated[str | None, typer.Option(metavar="VERSION", help="The reranker of these towers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Store a data set as a version that `retriever` can point at; with towers, as a bundle that reads contexts."""
    from models.card import Card
    from models.training import bundle, publish

    if towers is None and reranker is not None:
        raise typer.BadParameter("a reranker needs --towers", param_hint="--reranker")
    if towers is not None and index == "ivf":
        raise typer.BadParameter("what towers search is searched exactly", param_hint="--index")

    card = Card(
        name=name,
        kind="corpus",
        dim=0,
        encoder=encoder,
        license=license_,
        attribution=attribution,
        command=_command_line(),
    )
    with _progress("building the index") as progress:
        if towers is None:
            version = publish.publish_corpus(_registry(), data, card, index, progress)
        else:
            found = _existing_registry()
            order = found.find(reranker) if reranker else None
            version = bundle.publish_bundle(found, data, card, bundle.read(found.find(towers)), order)
    _print_version(version, as_json)


@app.command(rich_help_panel=MAKE)
def evaluate(
    version: Named,
    data: DataDir,
    train_data: Annotated[
        Path | None, typer.Option("--train-data", help="Training set, to fit the ridge baseline.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16 or int8.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Score a version as it is served (towers: with DIR as corpus) beside baselines; fails where its card says more."""
    from models import corpus as corpora
    from models import predictor
    from models.evaluate import beside_card
    from models.evaluate import evaluate as score
    from service.inventory import card_of

    target = _existing_registry().find(version)
    fit = corpora.read(train_data) if train_data else None
    if card_of(target.path).kind in ("corpus", "two_tower"):
        from models.training import bundle

        net: Any = bundle.read(target)
        scores = net.score(corpora.read(data), fit)
    else:
        net = predictor.load(target.path, device, os.cpu_count() or 1, precision)
        scores = score(net, corpora.read(data), net.card.context_length, fit)
    card = beside_card(scores, net.card)
    if as_json:
        _print_json({"version": target.id, "data": str(data), "runtime": net.runtime, "card": card, **scores})
    else:
        _print_scores(net.card.name, scores, net.runtime, card)
    if card and card["is_worse"]:
        raise typer.Exit(FAILED)


@app.command(rich_help_panel=MAKE)
def leaderboard(
    data: Annotated[str, typer.Option(metavar="[NAME=]DIR", help="In-distribution data set, not trained on.")],
    ood: Annotated[str, typer.Option(metavar="[NAME=]DIR", help="Data set of another domain.")],
    train_data: Annotated[
        Path | None, typer.Option("--train-data", help="Training set, to fit the ridge baseline; else the cards'.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of every timing; the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Where it goes; default LEADERBOARD.md in the registry.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time and score every net of the registry beside the baselines; write tables, plot and recommendations."""
    from bench import leaderboard as board
    from bench import plot, standings
    from models import corpus as corpora

    registry = _existing_registry()
    sets = {name: corpora.read(directory) for name, directory in (_named_dir(data), _named_dir(ood))}
    fit = corpora.read(train_data) if train_data else None
    figures = {"command": _command_line(), **board.measure(registry, sets, fit, rounds, _say)}
    target = out or registry.root / "LEADERBOARD.md"
    target.write_text(standings.to_markdown(figures), encoding="utf-8")
    plot.leaderboard(target.with_name("leaderboard.png"), figures)
    if as_json:
        _print_json({**figures, "recommendations": standings.recommend(figures)})
    else:
        _print_table(("for", "choose", "rule"), [(use, who, rule) for use, rule, who in standings.recommend(figures)])
        _say(f"{target}")


def _print_scores(name: str, scores: dict[str, Any], runtime: str, card: dict[str, Any] | None) -> None:
    everything = {name: scores, **scores["baselines"]}
    _print_table(
        ("predictor", "cosine", "margin", "R@1", "R@5", "R@50", "MRR", "MRR with context"),
        [_score_row(name, figures) for name, figures in everything.items()],
    )
    if card:
        verdict = "worse than" if card["is_worse"] else "within"
        _say(
            f"{runtime}: cosine {card['difference']:+.5f} beside the card's {card['cosine']:.5f} on {card['data']}, "
            f"{verdict} the tolerance of {card['tolerance']}"
        )


def _score_row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    without, with_ = figures["retrieval"]["without_context"], figures["retrieval"]["with_context"]
    numbers = (
        figures["cosine"],
        figures["margin"],
        *(without[k] for k in ("R@1", "R@5", "R@50", "MRR")),
        with_["MRR"],
    )
    return name, *(f"{number:.4f}" for number in numbers)


def _registry() -> Registry:
    return Registry(Path(os.environ.get("LVM_REGISTRY", "artifacts/lvm")))


def _existing_registry() -> Registry:
    registry = _registry()
    if not registry.root.is_dir():
        raise RegistryError(f"no registry at {registry.root.absolute()}: LVM_REGISTRY says where it is")
    return registry


def _json_option(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("want a JSON object")
    return value


def _named_dir(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    return name or Path(path).name, Path(path)


def _command_line() -> str:
    import shlex

    words = [word for word in sys.argv[1:] if word not in ("--resume", "--json")]  # they change nothing made
    return shlex.join(["lvm", *words])


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr where that is a terminal; yields a function of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _print_version_of_lvm(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("lvm-serve"))
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version_of_lvm, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve, train, judge and promote latent vector models."""


def _bearer(token: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def _check_alias(alias: str) -> None:
    if alias not in ALIASES:
        raise typer.BadParameter(f"{alias!r} is none of {', '.join(ALIASES)}", param_hint="ALIAS")


def _print_move(move: Move, as_json: bool, checked: dict[str, Any] | None = None) -> None:
    if as_json:
        _print_json({**vars(move), **({"checked": checked} if checked else {})})
    else:
        typer.echo(f"{move.alias}: {move.before or 'nothing'} -> {move.after}")


def _print_version(version: Any, as_json: bool) -> None:
    if as_json:
        _print_json({"version": version.version, "id": version.id, "path": str(version.path)})
    else:
        typer.echo(version.id)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _exit_code(error: Exception) -> int | None:
    """Return the exit status of an expected error, None for one that nobody expected."""
    codes: list[tuple[str, int]] = [
        ("LockHeld", LOCKED),
        ("Overtaken", LOCKED),
        ("RegistryError", FAILED),
        ("BadCheckpoint", BAD_CHECKPOINT),
        ("Refused", BAD_CHECKPOINT),
        ("Corrupt", BAD_CHECKPOINT),
        ("BadCorpus", BAD_CHECKPOINT),
        ("BadIndex", BAD_CHECKPOINT),
        ("BadArticles", BAD_CHECKPOINT),
        ("BadSettings", BAD_CONFIG),
        ("EncoderError", BAD_CONFIG),
        ("FileExistsError", CANNOT_CREATE),
        ("OSError", CANNOT_WRITE),
        ("CannotListen", BAD_CONFIG),
        ("NoSuchDevice", BAD_CONFIG),
        ("BadConfig", USAGE),
        ("UnfitTeacher", USAGE),
        ("NothingToLearnFrom", BAD_CHECKPOINT),
        ("AnotherRun", FAILED),
        ("ImportError", BAD_CONFIG),
    ]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return next((code for name, code in codes if name in kinds), None)


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    try:
        app()
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        hint = (
            " (make dev; for encoders: pip install -c constraints.txt -e '.[data]')"
            if isinstance(error, ImportError)
            else ""
        )
        print(f"lvm: {error}{hint}", file=sys.stderr)
        sys.exit(code)
    sys.exit(OK)


if __name__ == "__main__":
    main()
