"""The bench of the retrieval options, on a tiny corpus: each option is measured beside the others."""

from __future__ import annotations

from bench.retrieval_options import measure, options_of
from models.windows import require_windows
from tests.fakes import T, bundle


def test_measures_every_option() -> None:
    retriever = bundle()
    data = require_windows(retriever.corpus, T)
    found = {row.name: row for row in measure(retriever, data, options_of(retriever))}
    assert found.keys() == options_of(retriever).keys()
    assert all(0 <= row.recall <= 1 and row.articles >= 1 for row in found.values())
    assert found["`filter`: the right article"].articles == 1
    assert found["`filter`: all articles"][2:] == found["none"][2:]
