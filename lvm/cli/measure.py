"""Commands that measure: `lvm evaluate`, `lvm diagnose`, `lvm leaderboard`, `lvm bench`, `lvm plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lvm.cli.arguments import (
    AliasOrVersion,
    AsJson,
    ScoredData,
    check_environment,
    existing_registry,
    named_dir,
    read_data,
)
from lvm.cli.exit_codes import FAILED
from lvm.cli.output import (
    NOTHING_STORED,
    Progress,
    check_place,
    command_line,
    how_to_continue,
    long_work,
    print_json,
    print_message,
    print_table,
    write_file,
)
from models.cores import cores as cores_here
from models.recipe import NAMED_DATA

if TYPE_CHECKING:
    from models.predictor import Predictor
    from models.registry.registry import Version
    from models.retrieval.corpus import Corpus
    from models.training.bundle import LoadedTowers

Section = StrEnum("Section", ["nets", "closed", "rows", "open", "budget", "protocol", "retrieval", "start"])


def evaluate(
    version: AliasOrVersion,
    data: ScoredData,
    train_data: Annotated[
        Path | None, typer.Option("--train-data", help="Training set, to fit the ridge baseline.")
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option(metavar="DIR|FILE", help="Rank the next chunk among these vectors; default those of the data."),
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Windows to draw at random; default all.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="File for the figures as Nq_effective, R_at_k, MRR, mode and topK.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16 or int8.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Score a version as it is served, beside baselines.

    Towers search the data, or the bank, as their corpus. The command fails if the score is worse than the card says.
    """
    from models.evaluate import compare_with_card
    from models.windows import check_dim

    target, (name, directory) = existing_registry().find(version), named_dir(data)
    if metrics:
        check_place(metrics)
    with long_work("scoring", lambda: NOTHING_STORED) as progress:
        train = read_data(train_data) if train_data else None
        corpus = read_data(directory)
        served = _open(target, device, precision)
        for label, vectors in ((name, corpus), *([(str(train_data), train)] if train else [])):
            check_dim(label, vectors.dim, served.card.dim)
        in_bank = _score_in_bank(served, corpus, train, bank, sample, progress) if bank or sample else None
        scores = in_bank or _score(served, corpus, train)
    card = compare_with_card(scores, served.card)
    if metrics:
        _write_metrics(metrics, scores)
    if as_json:
        print_json({"version": target.id, "data": name, "runtime": served.runtime, "card": card, **scores})
    else:
        _print_scores(served.card.name, scores, served.runtime, card)
        _print_data(corpus, scores)
    if card and card["is_worse"]:
        raise typer.Exit(FAILED)


def _open(target: Version, device: str, precision: str) -> Predictor | LoadedTowers:
    """Return a net, or the towers of a corpus, as they are served."""
    from models.predictor import load_predictor
    from models.registry.card import read_card

    if read_card(target.path).kind in ("corpus", "two_tower"):
        from models.training import bundle

        return bundle.read(target)
    return load_predictor(target.path, device, cores_here(), precision)


def _score(served: Predictor | LoadedTowers, corpus: Corpus, train: Corpus | None) -> dict[str, Any]:
    from models.evaluate import evaluate as score
    from models.predictor import Predictor

    if isinstance(served, Predictor):
        return score(served, corpus, served.card.context_length, train)
    return served.score(corpus, train)


def _write_metrics(path: Path, scores: dict[str, Any]) -> None:
    from models.bank import metrics

    both = {protocol: metrics(scores, protocol) for protocol in ("with_context", "without_context")}
    write_file(path, json.dumps({**both["with_context"], **both}, indent=2))


def _score_in_bank(
    served: Predictor | LoadedTowers,
    corpus: Corpus,
    train: Corpus | None,
    bank: Path | None,
    sample: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Return the scores of windows of `corpus` in a bank, or without one in the corpus itself."""
    from models.bank import Ranked, draw, scores_in_bank
    from models.evaluate import baselines
    from models.predictor import Predictor
    from models.training.pairs import bank_of
    from models.windows import require_windows

    length = served.card.context_length
    ranked = Ranked(served.predict_batch) if isinstance(served, Predictor) else Ranked(served.query.run, served.payload)
    if "reranker" in served.card.config:
        print_message("these are the scores of the towers: the reranker of the bundle is left out")
    known = {name: Ranked(baseline) for name, baseline in baselines(length, train).items()}
    systems = {"": ranked, **known}
    data = draw(require_windows(corpus, length), sample)
    with TemporaryDirectory(prefix="lvm-") as scratch:
        size, blocks = (
            bank_of(bank, Path(scratch), corpus.dim) if bank else (len(corpus), lambda: iter([corpus.vectors]))
        )
        return scores_in_bank(systems, data, blocks, size, progress)


def _print_data(corpus: Corpus, scores: Mapping[str, Any]) -> None:
    """Print to stderr what kind of data was scored, if it is not a corpus of its own."""
    from models.windows import PairCorpus

    if "bank" in scores:
        size, held = scores["bank"]["chunks"], scores["bank"]["true_chunks"]
        print_message(f"{scores['windows']} windows in a bank of {size} chunks, which holds {held} of the next chunks")
    if isinstance(corpus, PairCorpus):
        crossing = "the file does not say which" if corpus.crossing is None else f"{corpus.crossing} of them"
        print_message(f"{len(corpus.pairs)} pairs, scored as they are; {crossing} cross articles")


def _print_scores(name: str, scores: dict[str, Any], runtime: str, card: dict[str, Any] | None) -> None:
    everything = {name: scores, **scores["baselines"]}
    print_table(
        ("predictor", "cosine", "std", "margin", "R@1", "R@5", "R@50", "MRR", "MRR with context"),
        [_score_row(name, figures) for name, figures in everything.items()],
    )
    if card:
        verdict = "worse than" if card["is_worse"] else "within"
        print_message(
            f"{runtime}: cosine {card['difference']:+.5f} beside the card's {card['cosine']:.5f} on {card['data']}, "
            f"{verdict} the tolerance of {card['tolerance']}"
        )


def _score_row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    without, with_ = figures["retrieval"]["without_context"], figures["retrieval"]["with_context"]
    retrieval = [without[k] for k in ("R@1", "R@5", "R@50", "MRR")]
    numbers = (figures["cosine"], figures["cosine_std"], figures["margin"], *retrieval, with_["MRR"])
    return name, *(f"{number:.4f}" for number in numbers)


def diagnose(
    version: AliasOrVersion,
    data: ScoredData,
    steps: Annotated[
        int, typer.Option(min=1, max=8, help="Chunks after the context: offsets up to this one, steps of the rollout.")
    ] = 3,
    sample: Annotated[int, typer.Option(min=1, help="Windows to draw at random, if the data has more.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw and of the shuffled contexts.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Picture of the figures.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16 or int8.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Say whether a net predicts, or copies what it read.

    The net runs as it is served. Shows how near its answers are to each chunk read and to each that follows, what the
    order of the context is worth, and answers that are fed back, beside baselines; docs/diagnose.md explains them.
    """
    from models import diagnose as diagnosis
    from models.predictor import load_predictor
    from models.retrieval.corpus import map_vectors
    from models.windows import check_dim

    if plot:
        # before the work, since it may not be installed
        from bench.plot import draw_diagnosis

        check_place(plot)
    target, (name, directory) = existing_registry().find(version), named_dir(data)
    net = load_predictor(target.path, device, cores_here(), precision)
    with long_work("asking the net", lambda: NOTHING_STORED) as progress:
        corpus = map_vectors(directory) if directory.is_dir() else read_data(directory)
        check_dim(name, corpus.dim, net.card.dim)
        chosen = diagnosis.stretches(corpus, net.card.context_length, steps, sample, seed)
        found = diagnosis.diagnose(net.predict_batch, corpus, chosen, seed, progress)
    figures = {"version": target.id, "data": name, "runtime": net.runtime, **found}
    if plot:
        draw_diagnosis(plot, figures)
    if as_json:
        print_json(figures)
    else:
        _print_diagnosis(figures, steps)


def _print_diagnosis(found: dict[str, Any], steps: int) -> None:
    import textwrap

    from lvm.cli.diagnosis import tables

    typer.echo(f"{found['version']} on {found['data']}\n")
    for title, head, rows in tables(found):
        typer.echo(title)
        print_table(head, rows, padding=0)
    typer.echo(textwrap.fill(found["verdict"]["text"], 80))
    typer.echo()
    if found["steps"] < steps:
        print_message("pairs have one following chunk: nothing is known of later ones")
    drawn = f", drawn from {found['drawn_from']:,}" if found["drawn_from"] > found["windows"] else ""
    print_message(f"{found['runtime']}: {found['windows']:,} windows of {found['articles']:,} articles{drawn}")


def leaderboard(
    data: Annotated[str, typer.Option(metavar=NAMED_DATA, help="In-distribution data set, not trained on.")],
    ood: Annotated[str, typer.Option(metavar=NAMED_DATA, help="Data set of another domain.")],
    train_data: Annotated[
        Path | None,
        typer.Option("--train-data", help="Training set, to fit the ridge baseline; default its scores on the cards."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of every timing; the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Report file; default LEADERBOARD.md in the registry.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time and score every net beside the baselines.

    Writes tables, a plot and recommendations. Ctrl-C stops the work; the same command continues it, and repeats the
    timing.
    """
    from bench import leaderboard as board
    from bench import leaderboard_report, plot
    from models.training.work_cache import cache_next_to

    found = existing_registry()
    target = out or found.root / "LEADERBOARD.md"
    check_place(target)
    sets = {name: read_data(directory) for name, directory in (named_dir(data), named_dir(ood))}
    train = read_data(train_data) if train_data else None
    with long_work("timing and scoring", lambda: how_to_continue(target)), cache_next_to(target) as cache:
        measured = board.measure(found, sets, train, rounds, print_message, cache)
        figures = {"command": command_line(), **measured}
        write_file(target, leaderboard_report.to_markdown(figures))
    plot.draw_leaderboard(target.with_name("leaderboard.png"), figures)
    recommended = leaderboard_report.recommend(figures)
    if as_json:
        print_json({**figures, "recommendations": recommended})
    else:
        print_table(("for", "choose", "rule"), [(use, net, rule) for use, rule, net in recommended])
        print_message(f"{target}")


def bench(
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds of one measurement.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each measurement.")] = 5,
    out: Annotated[Path, typer.Option(help="Directory for report.md, report.json and plots.")] = Path("runs/bench"),
    dim: Annotated[int, typer.Option(min=1, help="Dimensions of the nets (D).")] = 768,
    peers: Annotated[
        Path | None,
        typer.Option(callback=check_environment, help="Virtual environment of other servers to measure as well."),
    ] = None,
    only: Annotated[list[Section] | None, typer.Option(help="A section; repeat for several. Default all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure nets and service beside a naive app.

    Ratios compare measurements of one run. Ctrl-C stops the work; the same command continues after the last finished
    section. The command fails if an answer was wrong or another server did not start.
    """
    from bench.options import BenchOptions
    from bench.run import run
    from models.training.work_cache import cache_next_to

    options = BenchOptions(seconds, rounds, dim, out)
    report = out / "report.md"
    with long_work("measuring", lambda: how_to_continue(report)) as progress, cache_next_to(report) as cache:
        figures = run(options, only or list(Section), peers, print_message, progress, cache)
    print_json(figures) if as_json else typer.echo(report)
    if figures["failures"]:
        raise typer.Exit(FAILED)


def plan(
    rate: Annotated[float, typer.Option(min=0.001, help="Requests per second at the peak.")],
    p99: Annotated[float, typer.Option(min=0.001, help="Milliseconds that 99 % of the requests may take at most.")],
    net: Annotated[str, typer.Option(help="A net with measured costs: amn, gru, gmn.")] = "amn",
    wire: Annotated[Literal["octet", "json"], typer.Option(help="How contexts are sent.")] = "octet",
    rows: Annotated[int, typer.Option(min=1, help="Contexts in a request.")] = 1,
    vectors: Annotated[float, typer.Option(min=0, help="Vectors to search for each request; 0: none.")] = 0,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores of a machine; default those of this one.")] = None,
    memory_gb: Annotated[float, typer.Option(min=0.1, help="Memory of a machine, GB.")] = 8.0,
    costs: Annotated[
        Path | None, typer.Option(help="Costs from `python -m bench.capacity measure`; default those that ship.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate how many machines a load needs.

    Workers, memory and index shards, from measured costs and a simulation; docs/capacity.md explains the method.
    """
    from bench.capacity import sizing, table
    from bench.capacity.costs import SHIPPED, Costs

    demand = sizing.Demand(rate, p99, net, wire, rows, round(vectors), cores or cores_here(), memory_gb)
    found = sizing.plan(Costs.read(costs or SHIPPED), demand)
    if as_json:
        print_json(found)
        return
    print_table(("what", "value", "because"), table.of_plan(found))
    print_message(f"costs of {found['costs']['machine']}, {found['costs']['date']}")
