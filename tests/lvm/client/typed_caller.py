"""A caller's program, for the type checker: `mypy --strict` must accept it, and reject each line that it marks."""

from __future__ import annotations

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

from lvm import AsyncClient, Client
from lvm.client import Article, Articles, Embeddings, Health, Models, Passage, Prediction, Retrieval


def use(client: Client, contexts: NDArray[np.float64], ids: NDArray[np.int64]) -> None:
    """Call everything, as it may be called."""
    assert_type(client.predict(contexts, model="amn", profile="batch", timeout=None), Prediction)
    assert_type(client.predict("a passage").vectors, NDArray[np.float32])
    assert_type(client.predict(["chunk", "chunk"]).fallback_reason, str | None)
    vectors, _ = client.predict(contexts.tolist())
    found = client.retrieve(contexts[0], k=3, exclude=ids, filter={"lang": ["en", "de"], "year": 1999}, mmr=0.5)
    assert_type(found, Retrieval)
    assert_type([passage.rerank_score for passage in found], list[float | None])
    old: list[Passage] = client.retrieve(vectors, exclude={1, 2}, exclude_context=False, rerank=True)
    old.sort(key=lambda passage: passage.score)
    assert_type(client.retrieve_many(["a", ["b", "c"]], read_as="query", timeout=1.5), list[Retrieval])
    assert_type(client.embed("a", chunks=True, model="gru"), Embeddings)
    assert_type(client.articles("rabbit", limit=5), Articles)
    assert_type(client.article(3), Article)
    assert_type(client.article(3).windows().next_ids, list[int])
    assert_type(client.models(), Models)
    assert_type(client.health().is_ready, bool)
    client.wait_ready(timeout=5)


async def use_async(contexts: NDArray[np.float32]) -> None:
    """Call some of it in an event loop."""
    async with AsyncClient("http://x", token="t", concurrency=4, timeout=1, retries=0, rows=8) as client:
        assert_type(await client.health(), Health)
        assert_type([each async for each in client.map(client.predict, contexts)], list[Prediction])
        mapped = client.map(lambda context: client.retrieve(context, k=5), list(contexts))
        assert_type([each async for each in mapped], list[Retrieval])


def misuse(client: Client) -> None:
    """Call it as it may not be called."""
    client.predict([[1.0]], profile="fast")  # type: ignore[arg-type]
    client.retrieve([1.0], reranked=True)  # type: ignore[call-arg]
    client.retrieve([1.0], k="5")  # type: ignore[arg-type]
    client.embed(5)  # type: ignore[arg-type]
    client.articles(timeout="soon")  # type: ignore[arg-type]
    Client("http://x", retry=3)  # type: ignore[call-arg]
