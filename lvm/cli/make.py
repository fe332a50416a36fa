"""Make and judge versions: data, training, corpora, scores."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lvm.cli.arguments import (
    NAMED_DIR,
    AsJson,
    DataDir,
    Named,
    as_utf8,
    check_environment,
    check_model_name,
    complete_named,
    complete_version,
    existing_registry,
    json_object,
    named_dir,
    registry,
)
from lvm.cli.exit_codes import FAILED
from lvm.cli.output import (
    command_line,
    long_work,
    print_json,
    print_table,
    print_version,
    say,
)

Section = StrEnum("Section", ["nets", "closed", "rows", "open", "protocol", "retrieval", "start"])
NOTHING_KEPT = "nothing was stored; the same command begins anew"


def data(
    source: Annotated[
        Path,
        typer.Argument(
            help='Lines of {"title", "text" or "chunks"} (.jsonl, .jsonl.gz; - or a pipe), or .txt files.',
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The data set to make; must not exist.")],
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model.")] = "all-MiniLM-L6-v2",
    allow_download: Annotated[bool, typer.Option(help="Let the encoder be fetched from its hub.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn articles into a data set of chunks and vectors.

    Text is cut at sentence ends; chunks that the encoder cannot read are left out. Nothing is stored unless all is.
    Ctrl-C stops it; the same command goes on.
    """
    from dataclasses import asdict

    from models.text.encoder import SentenceTransformersEncoder, open_encoder
    from models.training import articles
    from models.training.parts import beside

    with long_work("encoding chunks", lambda: _how_to_go_on(out)) as progress:
        here = os.cpu_count() or 1
        model = (
            SentenceTransformersEncoder(encoder, allow_download=True) if allow_download else open_encoder(encoder, here)
        )
        made = articles.build(source, out, model, progress, beside(out))
    for warning in articles.warnings(made):
        say(f"lvm: {warning}")
    summary = asdict(made)
    print_json(summary) if as_json else print_table(("what", "count"), [(k, str(v)) for k, v in summary.items()])


def train(
    net: Annotated[str, typer.Argument(help="amn, gmn, gru, lstm, lstm_stack, mamba or transformer; or reranker.")],
    data: Annotated[str, typer.Option(metavar=NAMED_DIR, help="Training set; NAME is for the card.")],
    val: Annotated[
        list[str] | None, typer.Option(metavar=NAMED_DIR, help="Data sets to score on, for the card; repeat.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(callback=check_model_name, help="The model's name; default the net's.")
    ] = None,
    encoder: Annotated[str, typer.Option(help="The encoder of the data.")] = "all-MiniLM-L6-v2",
    config: Annotated[str, typer.Option(help="JSON of sizes other than the reference's.")] = "{}",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the windows.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 5e-4,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    noise: Annotated[float, typer.Option(help="Length of the noise added to each context vector.")] = 0.0,
    reverse: Annotated[float, typer.Option(min=0, max=1, help="Share of batches read backwards.")] = 0.0,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ALIAS|VERSION",
            autocompletion=complete_named,
            help="A version to learn from; repeat for an ensemble.",
        ),
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
        str, typer.Option("--license", callback=as_utf8, help="Licence of the data, and so of the net.")
    ] = "cc-by-sa-3.0",
    attribution: Annotated[str, typer.Option(callback=as_utf8, help="Whom the data's licence wants named.")] = "",
    two_tower: Annotated[
        bool, typer.Option("--two-tower", help="Train it as a query tower, with a payload tower, to retrieve.")
    ] = False,
    negatives: Annotated[int, typer.Option(min=1, help="Wrong chunks of the same article, for a two-tower.")] = 3,
    towers: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            autocompletion=complete_version,
            help="The two-tower whose finds the reranker is to order.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a net, score it as it will serve, and store it.

    Ctrl-C stops it; the same command with --resume goes on after the last whole epoch. A reranker learns from the
    articles of --data that its --towers held out.
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
        teachers=tuple(existing_registry().find(version).id for version in teacher) if teacher else (),
        distil=distil,
        seed=seed,
    )
    if towers is not None:
        order = RerankJob(
            name=name or net,
            towers=existing_registry().find(towers),
            data=named_dir(data),
            config=json_object(config),
            recipe=recipe,
            state=state,
            resume=resume,
            license=license_,
            attribution=attribution,
            command=command_line(),
        )
        with long_work("training a reranker", lambda: _how_to_resume(state)) as progress:
            print_version(run_rerank_job(order, registry(), progress, say), as_json)
        return
    job = Job(
        net=net,
        name=name or net,
        config=json_object(config),
        recipe=recipe,
        data=named_dir(data),
        validate=tuple(map(named_dir, val or ())),
        encoder=encoder,
        context_length=context_length,
        held_out=held_out,
        device=device,
        state=state,
        resume=resume,
        license=license_,
        attribution=attribution,
        command=command_line(),
        two_tower=two_tower,
    )
    with long_work(f"training {net}", lambda: _how_to_resume(state)) as progress:
        version = run_job(job, registry(), progress, say)
    print_version(version, as_json)


def _how_to_resume(state: Path) -> str:
    is_begun = state.exists()
    return f"the last whole epoch is in {state}; --resume goes on after it" if is_begun else _how_to_go_on(state)


def _how_to_go_on(made: Path) -> str:
    from models.training.parts import beside

    parts = beside(made).directory
    return f"what is done is in {parts}; the same command goes on after it" if parts.exists() else NOTHING_KEPT


def corpus(
    name: Annotated[str, typer.Argument(callback=check_model_name, help="The corpus's name in the registry.")],
    data: DataDir,
    encoder: Annotated[str, typer.Option(help="The encoder of the data.")] = "all-MiniLM-L6-v2",
    license_: Annotated[str, typer.Option("--license", callback=as_utf8, help="Licence of the text.")] = "cc-by-sa-3.0",
    attribution: Annotated[str, typer.Option(callback=as_utf8, help="Whom the licence wants named.")] = "",
    index: Annotated[
        Literal["auto", "flat", "ivf"],
        typer.Option(help="flat: exact; ivf: approximate, files stay on disk; auto: ivf for large corpora."),
    ] = "auto",
    towers: Annotated[
        str | None,
        typer.Option(
            metavar="ALIAS|VERSION",
            autocompletion=complete_named,
            help="A two-tower, or a bundle, to make it a bundle with.",
        ),
    ] = None,
    reranker: Annotated[
        str | None,
        typer.Option(metavar="VERSION", autocompletion=complete_version, help="The reranker of these towers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store a data set for `retriever` to search.

    With towers it is a bundle, which reads contexts as well as queries.
    """
    from models.registry.card import Card
    from models.training import bundle, publish

    source, directory = named_dir(data)
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
        data={"source": source},
        command=command_line(),
    )
    with long_work("building the index", lambda: _how_to_go_on(registry().root / name)) as progress:
        if towers is None:
            version = publish.publish_corpus(registry(), directory, card, index, progress)
        else:
            found = existing_registry()
            order = found.find(reranker) if reranker else None
            version = bundle.publish_bundle(found, directory, card, bundle.read(found.find(towers)), order)
    print_version(version, as_json)


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
    """Score a version as it is served, beside baselines.

    Towers are scored with DIR as their corpus. Fails where the card says more.
    """
    from models.evaluate import compare_with_card
    from models.evaluate import evaluate as score
    from models.predictor import load_predictor
    from models.registry.card import read_card
    from models.retrieval.corpus import read_corpus

    target, (name, directory) = existing_registry().find(version), named_dir(data)
    with long_work("scoring", lambda: NOTHING_KEPT):
        fit = read_corpus(train_data) if train_data else None
        if read_card(target.path).kind in ("corpus", "two_tower"):
            from models.training import bundle

            net: Any = bundle.read(target)
            scores = net.score(read_corpus(directory), fit)
        else:
            net = load_predictor(target.path, device, os.cpu_count() or 1, precision)
            scores = score(net, read_corpus(directory), net.card.context_length, fit)
    card = compare_with_card(scores, net.card)
    if as_json:
        print_json({"version": target.id, "data": name, "runtime": net.runtime, "card": card, **scores})
    else:
        _print_scores(net.card.name, scores, net.runtime, card)
    if card and card["is_worse"]:
        raise typer.Exit(FAILED)


def leaderboard(
    data: Annotated[str, typer.Option(metavar=NAMED_DIR, help="In-distribution data set, not trained on.")],
    ood: Annotated[str, typer.Option(metavar=NAMED_DIR, help="Data set of another domain.")],
    train_data: Annotated[
        Path | None, typer.Option("--train-data", help="Training set, to fit the ridge baseline; else the cards'.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of every timing; the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Where it goes; default LEADERBOARD.md in the registry.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time and score every net beside the baselines.

    Writes tables, a plot and recommendations. Ctrl-C stops it; the same command goes on, but for the timing.
    """
    from bench import leaderboard as board
    from bench import leaderboard_report, plot
    from models.retrieval.corpus import read_corpus
    from models.training.parts import beside

    found = existing_registry()
    sets = {name: read_corpus(directory) for name, directory in (named_dir(data), named_dir(ood))}
    fit = read_corpus(train_data) if train_data else None
    target = out or found.root / "LEADERBOARD.md"
    with long_work("timing and scoring", lambda: _how_to_go_on(target)), beside(target) as parts:
        figures = {"command": command_line(), **board.measure(found, sets, fit, rounds, say, parts)}
        target.write_text(leaderboard_report.to_markdown(figures), encoding="utf-8")
    plot.draw_leaderboard(target.with_name("leaderboard.png"), figures)
    if as_json:
        print_json({**figures, "recommendations": leaderboard_report.recommend(figures)})
    else:
        print_table(
            ("for", "choose", "rule"), [(use, who, rule) for use, rule, who in leaderboard_report.recommend(figures)]
        )
        say(f"{target}")


def bench(
    seconds: Annotated[float, typer.Option(min=0.01, help="Of one measurement.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 5,
    out: Annotated[Path, typer.Option(help="Where report.md, report.json and plots go.")] = Path("runs/bench"),
    dim: Annotated[int, typer.Option(min=1, help="D of the nets.")] = 768,
    peers: Annotated[
        Path | None, typer.Option(callback=check_environment, help="Virtual environment of peers to measure, too.")
    ] = None,
    only: Annotated[list[Section] | None, typer.Option(help="A section; repeat for several. Default all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure nets and service beside a naive app.

    Ratios are of one run. Ctrl-C stops it; the same command goes on after the last whole section. Fails where an answer
    was wrong or a peer did not start.
    """
    from bench.options import BenchOptions
    from bench.run import run
    from models.training.parts import beside

    options = BenchOptions(seconds, rounds, dim, out)
    kept = out / "report.md"
    with long_work("measuring", lambda: _how_to_go_on(kept)) as progress, beside(kept) as parts:
        figures = run(options, only or list(Section), peers, say, progress, parts)
    print_json(figures) if as_json else typer.echo(kept)
    if figures["failures"]:
        raise typer.Exit(FAILED)


def _print_scores(name: str, scores: dict[str, Any], runtime: str, card: dict[str, Any] | None) -> None:
    everything = {name: scores, **scores["baselines"]}
    print_table(
        ("predictor", "cosine", "margin", "R@1", "R@5", "R@50", "MRR", "MRR with context"),
        [_score_row(name, figures) for name, figures in everything.items()],
    )
    if card:
        verdict = "worse than" if card["is_worse"] else "within"
        say(
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
