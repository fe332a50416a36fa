"""The bench of partial contexts, on a tiny corpus: each way to make up missing chunks is measured beside the others."""

from __future__ import annotations

import numpy as np

from bench.partial_contexts import PADS, QUERIES, predict, retrieve
from models.vectors import complete_context
from models.windows import require_windows
from tests.fakes import D, FakePredictor, T, bundle


def test_measures_every_way_for_every_number_of_chunks() -> None:
    retriever = bundle()
    data = require_windows(retriever.corpus, T)
    ways = {(chunks, way) for chunks in range(1, T) for way in (*PADS, *QUERIES)}
    found = list(retrieve(retriever, data))
    assert {(each.chunks, each.way) for each in found} == ways | {(T, "the whole context")}
    assert all(0 <= each.recall <= 1 for each in found)
    made = list(predict(FakePredictor(), data))
    assert len(made) == len(ways) + 2
    assert all(-1 <= each.cosine <= 1 for each in made)


def test_one_chunk_is_repeated_by_every_padding() -> None:
    part = np.eye(1, D, dtype=np.float32)[None]
    for pad in PADS.values():
        np.testing.assert_array_equal(pad(part, T), np.repeat(part, T, axis=1))


def test_the_service_completes_a_context_as_the_bench_measures_it() -> None:
    parts = np.random.default_rng(0).standard_normal((1, 3, D)).astype(np.float32)
    padded = PADS["the mean of the chunks"](parts, T)[0]
    np.testing.assert_allclose(complete_context(parts[0], T), padded, atol=1e-6)
    np.testing.assert_array_equal(complete_context(padded, T), padded)
