"""Commands about versions and aliases: list, promote, roll back, remove, push, import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvm.cli import next_steps
from lvm.cli.arguments import (
    Alias,
    AliasOrVersion,
    AsJson,
    Token,
    Why,
    as_utf8,
    existing_registry,
    named_dir,
    read_data,
    registry,
)
from lvm.cli.exit_codes import FAILED
from lvm.cli.output import fits, print_json, print_message, print_table, print_version
from models.recipe import NAMED_DATA
from models.registry.alias import Alias as AliasName
from models.registry.registry import Move, Version, check_name

if TYPE_CHECKING:
    from lvm.cli.replicas import Replica


def models(
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Show what a running service serves instead; repeat."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 if they serve different versions, or one does not answer.")
    ] = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, scores, and which alias points at which.

    With --url, show what running services serve, since when, and how they differ.
    """
    if url:
        _print_replicas(url, token, check, as_json)
        return
    if check:
        raise typer.BadParameter("needs --url: it compares running services", param_hint="--check")
    from service.http.routes.models import summary

    found = existing_registry()
    aliases = found.aliases()
    broken = found.alias_faults()
    versions = [summary(version) for version in found.versions()]
    if as_json:
        print_json({"registry": str(found.root), "aliases": aliases, "broken": broken, "versions": versions})
    else:
        _print_versions(versions, aliases)
    for fault in broken.values():
        print_message(fault)


def _print_replicas(urls: list[str], token: str | None, check: bool, as_json: bool) -> None:
    from lvm.cli import replicas

    found = replicas.fetch(urls, token)
    different = replicas.differing(found)
    if as_json:
        print_json({"replicas": [replica._asdict() for replica in found], "differing": different})
    else:
        _print_served(found)
    for alias, served in different.items():
        print_message(f"{alias} differs: {', '.join(f'{version} at {at}' for at, version in served.items())}")
    if check and (different or any(replica.error for replica in found)):
        raise typer.Exit(FAILED)


def _print_served(found: list[Replica]) -> None:
    from lvm.cli import replicas

    wide = replicas.HEAD, list(replicas.rows(found))
    if fits(*wide):
        print_table(*wide)
        return
    print_table(replicas.NARROW_HEAD, list(replicas.narrow_rows(found)))
    for note in replicas.notes(found):
        print_message(note)


def _print_versions(versions: list[dict[str, Any]], aliases: Mapping[str, str]) -> None:
    from lvm.cli import listing

    wide = listing.wide(versions, aliases)
    if fits(*wide):
        print_table(*wide)
        return
    print_table(*listing.narrow(versions, aliases))
    for error in listing.errors(versions):
        print_message(error)


def promote(
    alias: Alias,
    version: AliasOrVersion,
    why: Why = "",
    data: Annotated[
        list[str] | None,
        typer.Option(metavar=NAMED_DATA, help="A data set on its card, to score it on; repeat."),
    ] = None,
    evidence: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A running service that has VERSION as candidate: require that its live scores are as good.",
        ),
    ] = None,
    min_pairs: Annotated[
        int, typer.Option(min=1, help="With --evidence: how many contexts must have shown both scores.")
    ] = 500,
    token: Token = None,
    force: Annotated[
        bool, typer.Option("--force", help="Override all objections except damage; requires --why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Point ALIAS at VERSION, if it passes the gate.

    Prints what the gate measured. A running service follows within a second, and rolls back automatically if the new
    version misbehaves.
    """
    if force and not why:
        raise typer.BadParameter("needs --why: the ledger keeps what was overridden, and why", param_hint="--force")
    if evidence and alias != AliasName.PRIMARY:
        raise typer.BadParameter("is for `primary`, which the candidate is compared with", param_hint="--evidence")
    # as in the server, so that the gate measures the same times
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lvm.cli.evidence import scrape, weigh
    from models import gate

    found = existing_registry()
    target = found.find(version)
    sets = {name: read_data(directory) for name, directory in map(named_dir, data or ())}
    verdict = gate.judge(found, alias, target, sets)
    if alias != AliasName.RETRIEVER and (chosen := _chosen_precision(target)):
        verdict = replace(verdict, figures={**verdict.figures, "precision": chosen})
    if evidence:
        shown = weigh(scrape(evidence, token), target.id, verdict.aliases_before[AliasName.PRIMARY], min_pairs)
        figures = {**verdict.figures, "live": shown.figures}
        verdict = replace(verdict, figures=figures, objections=verdict.objections + shown.objections)
        why = "; ".join(filter(None, (why, shown.sentence)))
    if verdict.objections and not force:
        raise gate.PromotionRejected(verdict.objections)
    for objection in verdict.objections:
        print_message(f"overridden: {objection}")
    overrode = [f"{type(objection).__name__}: {objection}" for objection in verdict.objections]
    move = found.point(alias, target, why=why, overrode=overrode, expected=verdict.aliases_before)
    _print_move(move, as_json, verdict.figures)
    if not as_json:
        _print_figures(verdict.figures)


def _chosen_precision(target: Version) -> dict[str, Any] | None:
    """Return the choice of LVM_PRECISION=auto for a net on this machine, made and kept if it is new; else None."""
    from models.predictor import load_net
    from models.trial import CHOICES_DIRECTORY, choose_for
    from service.settings import read_settings

    settings = read_settings()
    if settings.precision != "auto":
        return None
    choice, _ = choose_for(target, load_net(target.path), settings.cache.expanduser() / CHOICES_DIRECTORY)
    return asdict(choice)


def rollback(alias: Alias, why: Why = "", as_json: AsJson = False) -> None:
    """Point ALIAS back at the version before.

    A second rollback goes back one version more.
    """
    found = existing_registry()
    _print_move(found.rollback(alias, why=why), as_json)
    if skipped := found.read_ledger().skipped:
        print_message(f"invalid lines in the ledger: {skipped}")


def unset(
    alias: Alias,
    why: Why = "",
    force: Annotated[
        bool, typer.Option("--force", help="Remove a fallback or the retriever all the same; requires --why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove ALIAS, such as the candidate.

    A running service lets the candidate go within a second. It serves a fallback or the retriever until it restarts.
    `lvm rollback ALIAS` sets the alias again.
    """
    if force and not why:
        raise typer.BadParameter("needs --why, for the ledger", param_hint="--force")
    _print_move(existing_registry().unset(alias, why=why, force=force), as_json)
    if alias != AliasName.CANDIDATE:
        print_message(f"running services serve {alias} until they restart")


def push(
    url: Annotated[str, typer.Argument(metavar="URL", help="s3://bucket/prefix, or any URL that fsspec opens.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite what another registry pushed there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish aliases and versions in an object store.

    Services with this URL as LVM_REGISTRY follow within LVM_STORE_S.
    """
    from models.registry.remote import RemoteRegistry

    found = existing_registry()
    changed = RemoteRegistry(url).push(found, force=force)
    if as_json:
        print_json({"aliases": found.aliases(), "changed": sorted(changed)})
        return
    for alias, target in found.aliases().items():
        typer.echo(f"{alias}: {target}{'' if alias in changed else ', as before'}")
    print_message(next_steps.after_push(url))


def _print_move(move: Move, as_json: bool, checked: dict[str, Any] | None = None) -> None:
    if as_json:
        print_json({**vars(move), **({"checked": checked} if checked else {})})
    else:
        typer.echo(f"{move.alias}: {move.before or 'nothing'} -> {move.after or 'nothing'}")


def _print_figures(figures: Mapping[str, Any]) -> None:
    """Print to stderr what the gate measured."""
    from lvm.cli import verdict

    if measured := list(verdict.rows(figures)):
        print_table(verdict.HEAD, measured, is_message=True)
    print_message(verdict.passed(figures))


def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A file of torch.save, safetensors or ONNX.", exists=True, readable=False),
    ],
    name: Annotated[
        str,
        typer.Option(
            callback=check_name,
            help="The model's name in the registry. If it is amn, gru, lstm or the like, the file must hold that net.",
        ),
    ],
    architecture: Annotated[
        str | None,
        typer.Option(
            metavar="NET", help="The net, if the file and its tensors do not determine it: amn, gru, lstm, ..."
        ),
    ] = None,
    encoder: Annotated[str, typer.Option(help="The encoder whose vectors the net reads.")] = "unspecified",
    context_length: Annotated[int | None, typer.Option(help="T; default: what the file says, or 5.")] = None,
    license_: Annotated[str, typer.Option("--license", callback=as_utf8, help="Licence of the weights.")] = "other",
    output: Annotated[
        str | None, typer.Option(metavar="OUTPUT", help="The output to keep of an ONNX file that has several.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar=NAMED_DATA, help="A data set to score it on, for its card; repeat.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a version of a model in a file.

    With --data the cosine that the file states is compared with the one that the served version has on the data.
    Tensors that are missing, unexpected or not finite are rejected, and no code in the file runs.
    """
    from models.registry.card import Card, read_card
    from models.training.imported import ImportOptions
    from models.training.importing import publish_model, read_model
    from models.training.stated import comparisons

    named = [named_dir(each) for each in data or ()]
    sets = {known: read_data(directory) for known, directory in named}
    dim = next((corpus.dim for corpus in sets.values()), None)
    options = ImportOptions(name, architecture, context_length, dim, output, print_message)
    model = read_model(file, options)
    asked = f" --architecture {architecture}" if architecture else ""
    asked += f" --output {as_utf8(output)}" if output else ""
    card = Card(
        name=name,
        kind="net",
        dim=0,
        encoder=encoder,
        license=license_,
        attribution="Imported; who trained it holds its rights.",
        command=f"lvm import {as_utf8(file.name)} --name {name}{asked}",
    )
    version = publish_model(registry(), model, options, card, sets)
    found = read_card(version.path)
    compared = comparisons(found, found.scores)
    for each in compared:
        print_message(str(each))
    cosines = [{**asdict(each), "differs": each.differs} for each in compared]
    print_version(version, as_json, {"cosine": cosines} if cosines else {})
    if not as_json:
        print_message(next_steps.after_version(registry(), version, [directory for _, directory in named]))
