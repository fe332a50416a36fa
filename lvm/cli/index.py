"""Put a corpus where else it is searched."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from lvm.cli.arguments import AsJson, Named, existing_registry
from lvm.cli.output import long_work, print_json, say

GOES_ON = "what was stored stays; the same command goes on after it"


def push(
    version: Named = "retriever",
    uri: Annotated[
        str | None, typer.Option(help="The Milvus; default LVM_MILVUS_URI. Token: LVM_MILVUS_TOKEN.")
    ] = None,
    index: Annotated[
        Literal["flat", "hnsw"], typer.Option(help="flat: exact; hnsw: approximate, for very large corpora.")
    ] = "flat",
    anew: Annotated[bool, typer.Option("--anew", help="Drop the collection of this version first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a corpus version's vectors into a Milvus, for LVM_MILVUS_URI to be searched.

    The collection is named by the version's digest; stopped, the same command goes on, and done, it does nothing.
    """
    from models.retrieval.milvus import MilvusPush, alias_of
    from models.retrieval.retriever import load_retriever
    from service.settings import BadSettings, read_settings

    settings = read_settings(**({"milvus_uri": uri} if uri else {}))
    if not settings.milvus_uri:
        raise BadSettings("LVM_MILVUS_URI: which Milvus? --uri says so too")
    corpus = load_retriever(existing_registry().find(version).path)
    token = settings.milvus_token.get_secret_value()
    with long_work("pushing vectors", lambda: GOES_ON) as progress:
        order = MilvusPush(settings.milvus_uri, token, corpus.sha256, corpus.indexes, index)
        if anew:
            order.drop()
        pushed = order.run(alias_of(corpus.name), progress)
    if as_json:
        print_json(asdict(pushed))
    else:
        say(f"{pushed.inserted:,} of {pushed.rows:,} rows are new; {pushed.alias} stood for {pushed.was or 'nothing'}")
        typer.echo(pushed.collection)
