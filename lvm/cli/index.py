"""`lvm index`: push a corpus to Milvus."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from lvm.cli.arguments import AliasOrVersion, AsJson, existing_registry
from lvm.cli.output import long_work, print_json, print_message

HOW_TO_CONTINUE = "rows that were stored remain; the same command continues after them"


def push(
    version: AliasOrVersion = "retriever",
    uri: Annotated[
        str | None, typer.Option(help="URI of the Milvus; default LVM_MILVUS_URI. Token: LVM_MILVUS_TOKEN.")
    ] = None,
    index: Annotated[
        Literal["flat", "hnsw"], typer.Option(help="flat: exact; hnsw: approximate, for very large corpora.")
    ] = "flat",
    anew: Annotated[bool, typer.Option("--anew", help="Drop the collection of this version first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push the vectors of a corpus version to the Milvus that LVM_MILVUS_URI names.

    The collection is named after the version's digest. After Ctrl-C the same command continues; if all rows are
    stored, it does nothing.
    """
    from models.retrieval.milvus import MilvusPush, alias_of
    from models.retrieval.retriever import load_retriever
    from service.settings import BadSettings, read_settings

    settings = read_settings(**({"milvus_uri": uri} if uri else {}))
    if not settings.milvus_uri:
        raise BadSettings("LVM_MILVUS_URI is not set: set it, or use --uri")
    corpus = load_retriever(existing_registry().find(version).path)
    token = settings.milvus_token.get_secret_value()
    with long_work("pushing vectors", lambda: HOW_TO_CONTINUE) as progress:
        order = MilvusPush(settings.milvus_uri, token, corpus.sha256, corpus.indexes, index)
        if anew:
            order.drop()
        pushed = order.run(alias_of(corpus.name), progress)
    if as_json:
        print_json(asdict(pushed))
    else:
        before = pushed.was or "nothing"
        print_message(f"{pushed.inserted:,} of {pushed.rows:,} rows are new; {pushed.alias} pointed at {before} before")
        typer.echo(pushed.collection)
