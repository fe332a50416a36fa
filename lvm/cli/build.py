"""Commands that build versions and what they are built from: `lvm data`, `lvm train`, `lvm corpus`."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lvm.cli import next_steps
from lvm.cli.arguments import (
    AsJson,
    DataDir,
    as_utf8,
    as_utf8_or_none,
    complete_alias_or_version,
    complete_version,
    existing_registry,
    named_dir,
    registry,
    registry_to_read,
)
from lvm.cli.exit_codes import FAILED
from lvm.cli.options import options_from
from lvm.cli.output import (
    NOTHING_STORED,
    command_line,
    how_to_continue,
    long_work,
    print_json,
    print_message,
    print_table,
    print_version,
    size_text,
)
from models.cores import cores
from models.recipe import RERANKER, Job
from models.registry.registry import Registry, Version, check_name

if TYPE_CHECKING:
    from models.training.bundle import BundleParts

DEFAULT_ENCODER = "all-MiniLM-L6-v2"


def data(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help='Lines of {"title", "text" or "chunks"} (.jsonl, .jsonl.gz; - or a pipe), .txt files, '
            "or vectors (.npz, .npy).",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The data set to make; must not exist.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            callback=as_utf8_or_none,
            help="A sentence-transformers model, default all-MiniLM-L6-v2; of vectors, the name of what made them.",
        ),
    ] = None,
    allow_download: Annotated[bool, typer.Option(help="Allow the encoder to be downloaded from its hub.")] = False,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=ARRAY",
            help="Which array has the vectors, texts, ids, articles, positions or titles; repeat. Empty: none.",
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="A field of chunks or articles to keep; repeat.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave out vectors that are zero or not finite.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn articles, or vectors as they are, into a data set.

    Text is cut at sentence ends. Chunks that the encoder cannot read are left out. Vectors are kept as they are, of
    unit length. The data set is stored whole or not at all. If the work is stopped or killed, the same command
    continues it.
    """
    from models.training.array_files import SUFFIXES

    began = perf_counter()
    kept = tuple(metadata or ())
    if source.name.lower().endswith(SUFFIXES):
        if allow_download:
            raise typer.BadParameter("only for articles: vectors need no encoder", param_hint="--allow-download")
        summary, found = _from_vectors(source, out, encoder, _roles(field or []), kept, skip_bad)
    else:
        if field or skip_bad:
            raise typer.BadParameter("only for vectors, a .npz or .npy file", param_hint="--field, --skip-bad")
        summary, found = _from_articles(source, out, encoder or DEFAULT_ENCODER, allow_download, kept)
    for warning in found:
        print_message(f"lvm: {warning}")
    _print_costs(began)
    if as_json:
        print_json(summary)
        return
    print_table(("what", "count"), [(name, _shown(value)) for name, value in summary.items()])
    print_message(next_steps.after_data(registry_to_read(), out, summary))


def _print_costs(began: float) -> None:
    """Print what this process took since `began`, and its processor time and memory since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    costs = f"{perf_counter() - began:.0f} s, {process_time():.0f} s of processor time"
    print_message(f"lvm: {costs}, {size_text(peak)} of memory at most")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{role}={name}" for role, name in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _roles(fields: Sequence[str]) -> dict[str, str]:
    """Return the names of arrays by role; raises `BadParameter` for anything but ROLE=ARRAY."""
    from models.training.vector_files import ROLES

    pairs = [field.partition("=") for field in fields]
    wrong = [role for role, equals, _ in pairs if role not in ROLES or not equals]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r}: expected one of {', '.join(ROLES)}, and =ARRAY", param_hint="--field")
    return {role: as_utf8(name) for role, _, name in pairs}


def _from_articles(
    source: Path, out: Path, encoder: str, allow_download: bool, metadata: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Make a data set of articles; return its summary and its warnings."""
    from models.text.encoder import SentenceTransformersEncoder, open_encoder
    from models.training import articles
    from models.training.work_cache import cache_next_to

    with long_work("encoding characters", lambda: how_to_continue(out), shows_rate=True) as progress:
        threads = cores()
        model = (
            SentenceTransformersEncoder(encoder, allow_download=True)
            if allow_download
            else open_encoder(encoder, threads, may_use_bf16=True)
        )
        made = articles.build(source, out, model, progress, cache_next_to(out), metadata)
    return asdict(made), articles.warnings(made)


def _from_vectors(
    source: Path, out: Path, encoder: str | None, fields: Mapping[str, str], metadata: Sequence[str], skip_bad: bool
) -> tuple[dict[str, Any], list[str]]:
    """Make a data set of vectors that are already computed; return its summary and its warnings."""
    from models.training import vector_files
    from models.training.work_cache import cache_next_to

    with long_work("reading vectors", lambda: how_to_continue(out)) as progress:
        made = vector_files.build(source, out, encoder or "", fields, metadata, skip_bad, progress, cache_next_to(out))
    return asdict(made), vector_files.warnings(made)


@options_from(Job, {"teachers": complete_alias_or_version, "towers": complete_version})
def train(job: Job, as_json: AsJson = False) -> None:
    """Train a net, score it as it will be served, and store it.

    Ctrl-C stops the training; the same command with --resume continues after the last finished epoch. A reranker is
    trained on the articles of --data that its --towers held out.
    """
    from models.training.job import run_job

    began = perf_counter()
    _check(job)
    found = existing_registry() if job.towers or job.recipe.teachers else registry()
    job = replace(job, command=command_line())
    with long_work(f"training {job.net}", lambda: _how_to_resume(job.state)) as progress:
        version = run_job(job, found, progress, print_message)
    data = [each.directory for each in job.val] or ([job.data[0].directory] if job.towers or job.two_tower else [])
    _print_made(began, found, version, as_json, data)


def _print_made(began: float, found: Registry, version: Version, as_json: bool, data: Sequence[Path] = ()) -> None:
    _print_costs(began)
    print_version(version, as_json)
    if not as_json:
        print_message(next_steps.after_version(found, version, data))


def _check(job: Job) -> None:
    if (job.net == RERANKER) is not bool(job.towers):
        raise typer.BadParameter("required for a reranker, and only for a reranker", param_hint="--towers")
    if job.two_tower and job.recipe.is_for_nets_that_predict:
        raise typer.BadParameter(
            "a two-tower takes no --noise, --drop, --reverse, --contrast or --teacher", param_hint="--two-tower"
        )


def _how_to_resume(state: Path) -> str:
    if state.exists():
        return f"the state after the last finished epoch is in {state}; continue with --resume"
    return how_to_continue(state)


def overlap(
    held_out: Annotated[Path, typer.Argument(metavar="HELD_OUT", help="The data set that is scored on.")],
    train: Annotated[list[Path], typer.Argument(metavar="TRAIN...", help="The data sets that are trained on.")],
    as_json: AsJson = False,
) -> None:
    """Count what a held-out data set shares with training sets.

    These are articles of the same title, and chunks whose cosine to a training chunk is above 0.95. The command fails
    if an article is in both.
    """
    from models.training.overlap import find_overlap

    with long_work("comparing chunks", lambda: NOTHING_STORED) as progress:
        found = find_overlap(held_out, train, progress)
    if as_json:
        print_json(asdict(found))
    else:
        print_table(("what", "count"), [(name, _shown(value)) for name, value in asdict(found).items()])
    if found.shared_titles:
        raise typer.Exit(FAILED)


def corpus(
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=check_name, help="The corpus's name in the registry.")
    ],
    data: DataDir,
    encoder: Annotated[
        str | None, typer.Option(help="The encoder of the data; default what the data say, or all-MiniLM-L6-v2.")
    ] = None,
    license_: Annotated[str, typer.Option("--license", callback=as_utf8, help="Licence of the text.")] = "cc-by-sa-3.0",
    attribution: Annotated[
        str, typer.Option(callback=as_utf8, help="Whom the licence of the text requires to be named.")
    ] = "",
    index: Annotated[
        Literal["auto", "flat", "ivf"],
        typer.Option(help="flat: exact; ivf: approximate, files stay on disk; auto: ivf for large corpora."),
    ] = "auto",
    towers: Annotated[
        str | None,
        typer.Option(
            metavar="ALIAS|VERSION",
            autocompletion=complete_alias_or_version,
            help="A two-tower, or a bundle, whose towers the new bundle gets.",
        ),
    ] = None,
    reranker: Annotated[
        str | None,
        typer.Option(metavar="VERSION", autocompletion=complete_version, help="The reranker of these towers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store a data set for `retriever` to search.

    With --towers the version is a bundle, which takes contexts as well as queries.
    """
    from models.registry.card import Card
    from models.retrieval.corpus import stated_encoder
    from models.training.publish_corpus import publish_corpus

    began = perf_counter()
    source, directory = named_dir(data)
    if towers is None and reranker is not None:
        raise typer.BadParameter("a reranker needs --towers", param_hint="--reranker")

    card = Card(
        name=name,
        kind="corpus",
        dim=0,
        encoder=encoder or stated_encoder(directory) or DEFAULT_ENCODER,
        license=license_,
        attribution=attribution,
        data={"source": source},
        command=command_line(),
    )
    with long_work("building the index", lambda: how_to_continue(registry().root / name)) as progress:
        extension = _bundle_parts(towers, reranker) if towers else None
        version = publish_corpus(registry(), directory, card, index, progress, extension)
    _print_made(began, registry(), version, as_json)


def _bundle_parts(towers: str, reranker: str | None) -> BundleParts:
    from models.training import bundle

    found = existing_registry()
    return bundle.BundleParts(bundle.read(found.find(towers)), found.find(reranker) if reranker else None)
