"""Versions and aliases: what there is, what serves, and how that changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lvm.cli.arguments import (
    NAMED_DIR,
    Alias,
    AsJson,
    Named,
    Token,
    Url,
    Why,
    as_utf8,
    existing_registry,
    named_dir,
    registry,
)
from lvm.cli.exit_codes import FAILED
from lvm.cli.output import (
    print_json,
    print_table,
    print_version,
    say,
)
from models.registry.registry import Move


def models(
    url: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Ask what a running service serves instead; repeat.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 where these serve different versions, or one does not answer.")
    ] = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, scores, and which alias serves which.

    With --url, what replicas serve, since when, and where they differ.
    """
    if url:
        _replicas(url, token, check, as_json)
        return
    if check:
        raise typer.BadParameter("say --url: it is replicas that are compared", param_hint="--check")
    from service.http.routes.models import summary

    found = existing_registry()
    aliases = found.aliases()
    broken = found.alias_faults()
    versions = [summary(version) for version in found.versions()]
    if as_json:
        print_json({"registry": str(found.root), "aliases": aliases, "broken": broken, "versions": versions})
    else:
        rows = [_row(version, aliases) for version in versions]
        print_table(("version", "alias", "net", "T x D", "parameters", "data", "cosine", "margin"), rows)
    for fault in broken.values():
        say(fault)


def _replicas(urls: list[str], token: str | None, check: bool, as_json: bool) -> None:
    from lvm.cli import replicas

    found = replicas.ask(urls, token)
    apart = replicas.differing(found)
    if as_json:
        print_json({"replicas": [replica._asdict() for replica in found], "differing": apart})
    else:
        print_table(("alias", "replica", "version", "since", "breaker", ""), list(replicas.rows(found)))
    for alias, served in apart.items():
        say(f"{alias} differs: {', '.join(f'{version} at {at}' for at, version in served.items())}")
    if check and (apart or any(replica.error for replica in found)):
        raise typer.Exit(FAILED)


def _row(version: Mapping[str, Any], aliases: Mapping[str, str]) -> tuple[str, ...]:
    scores: Mapping[str, Mapping[str, float]] = version.get("scores", {})
    return (
        version["id"],
        ", ".join(alias for alias, target in aliases.items() if target == version["id"]),
        version.get("architecture") or version.get("kind") or version["error"],
        f"{version['context_length']} x {version['dim']}" if "dim" in version else "",
        f"{version['parameters']:,}" if version.get("parameters") else "",
        "\n".join(scores),
        *("\n".join(f"{score[figure]:.4f}" for score in scores.values()) for figure in ("cosine", "margin")),
    )


def promote(
    alias: Alias,
    version: Named,
    why: Why = "",
    data: Annotated[
        list[str] | None, typer.Option(metavar=NAMED_DIR, help="A data set on its card, to score it on; repeat.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Against all objections but damage; the ledger wants to know --why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Point ALIAS at VERSION, if it passes the gate.

    A running service follows within a second, and goes back by itself where the version does badly.
    """
    if force and not why:
        raise typer.BadParameter("say --why: the ledger keeps what was overridden, and why", param_hint="--force")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as it is served
    from models import gate
    from models.retrieval.corpus import read_corpus

    found = existing_registry()
    target = found.find(version)
    sets = {name: read_corpus(directory) for name, directory in map(named_dir, data or ())}
    verdict = gate.judge(found, alias, target, sets)
    if verdict.objections and not force:
        raise gate.PromotionRejected(verdict.objections)
    for objection in verdict.objections:
        say(f"overridden: {objection}")
    overrode = [f"{type(objection).__name__}: {objection}" for objection in verdict.objections]
    move = found.point(alias, target, why=why, overrode=overrode, expected=verdict.aliases_before)
    _print_move(move, as_json, verdict.figures)


def rollback(alias: Alias, why: Why = "", as_json: AsJson = False) -> None:
    """Point ALIAS back at the version before.

    Twice goes two back.
    """
    found = existing_registry()
    _print_move(found.rollback(alias, why=why), as_json)
    if skipped := found.read_ledger().skipped:
        say(f"invalid lines in the ledger: {skipped}")


def push(
    url: Annotated[str, typer.Argument(metavar="URL", help="s3://bucket/prefix, or whatever fsspec opens.")],
    force: Annotated[bool, typer.Option("--force", help="Also take back what another registry pushed there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish aliases and versions in an object store.

    Services whose LVM_REGISTRY is that URL follow within LVM_STORE_S.
    """
    from models.registry.remote import RemoteRegistry

    found = existing_registry()
    changed = RemoteRegistry(url).push(found, force=force)
    if as_json:
        print_json({"aliases": found.aliases(), "changed": sorted(changed)})
        return
    for alias, target in found.aliases().items():
        typer.echo(f"{alias}: {target}{'' if alias in changed else ', as before'}")


def _print_move(move: Move, as_json: bool, checked: dict[str, Any] | None = None) -> None:
    if as_json:
        print_json({**vars(move), **({"checked": checked} if checked else {})})
    else:
        typer.echo(f"{move.alias}: {move.before or 'nothing'} -> {move.after}")


def report(url: Url = "http://127.0.0.1:8000", token: Token = None, as_json: AsJson = False) -> None:
    """Report how its answers compare with those that callers got."""
    import httpx

    from lvm.client import auth_headers
    from service.deploy.shadow import summarize_shadow

    try:
        scrape = httpx.get(f"{url}/metrics", headers=auth_headers(token), timeout=10).raise_for_status().text
    except httpx.HTTPError as error:
        say(f"lvm: no metrics from {url}: {error}\nnext: name where it listens, and --token where it wants one")
        raise typer.Exit(FAILED) from error
    found = summarize_shadow(scrape)
    rows = {**found.pop("requests"), **found}
    if as_json:
        print_json(rows)
    else:
        shown = [(name, "-" if value is None else f"{value:.6g}") for name, value in rows.items()]
        print_table(("what", "value"), shown)


def import_(
    file: Annotated[Path, typer.Argument(help="What torch.save wrote.", exists=True, readable=False)],
    name: Annotated[str, typer.Option(help="amn, gru, lstm (either variant) or transformer.")],
    encoder: Annotated[str, typer.Option(help="The encoder whose vectors the net reads.")] = "unspecified",
    context_length: Annotated[int | None, typer.Option(help="T, where the file does not say; else 5.")] = None,
    license_: Annotated[str, typer.Option("--license", callback=as_utf8, help="Licence of the weights.")] = "other",
    data: Annotated[
        str | None, typer.Option(metavar=NAMED_DIR, help="A data set to score it on, for its card.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a version of what somebody's torch.save wrote.

    Strictly: what is missing, too much or not finite is refused, and nothing in the file is run.
    """
    from models.nets import architecture_of, config_dict
    from models.registry.card import Card
    from models.retrieval.corpus import read_corpus
    from models.training import foreign, publish

    net = foreign.read_net(file, name, context_length, say)
    scored = {said: read_corpus(directory) for said, directory in map(named_dir, [data] if data else [])}
    corpus = next(iter(scored.values()), None)
    config = config_dict(net)
    golden = publish.golden_contexts(corpus, config["dim"], config["context_length"])
    card = Card(
        name=architecture_of(net),
        kind="net",
        dim=config["dim"],
        encoder=encoder,
        license=license_,
        attribution="Imported; who trained it holds its rights.",
        command=f"lvm import {file.name} --name {name}",
        reference=publish.reference_of(corpus) if corpus else None,
        limits=("Imported: what it was trained on is not known here.",),
    )
    print_version(publish.publish(registry(), net, card, golden, scored), as_json)
