"""JSON beside the bare calls: what is timed reads the same numbers, and writes the vectors."""

import json

import numpy as np
import pytest

from bench import codec

DIM = 16


@pytest.mark.parametrize("case", [*codec.cases([DIM])], ids=lambda case: case.name)
def test_what_is_timed_reads_and_writes_the_same_vectors(case: codec.Case) -> None:
    times = codec.measure(case, 1)
    assert times.bare > 0
    assert times.ours > 0
    if case.name.startswith("write"):
        ours, bare = (json.loads(call(case.inputs[0])) for call in (case.ours, case.bare))
        assert bare.items() <= {**ours, **(ours.get("outputs") or [{}])[0]}.items()


def test_a_reader_of_other_numbers_is_not_timed() -> None:
    with pytest.raises(ValueError, match="other numbers"):
        codec.measure(codec.Case("read", [b""], lambda body: np.zeros(3), lambda body: np.ones(3)), 1)


def test_the_table_has_ratios() -> None:
    assert codec.to_markdown([codec.Times("read", 42_000, 50.0, 55.0)]).splitlines()[2:] == [
        "| read | 42,000 | 50.0 | 55.0 | 1.10 |"
    ]
