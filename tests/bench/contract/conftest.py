"""Samples made up: what a service would have done."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.contract.samples import Samples

Make = Callable[..., Samples]


@pytest.fixture
def make() -> Make:
    """Return a function that makes `rate` arrivals a second from `begin` to `end`, good and 10 ms each."""

    def samples(begin: float, end: float, rate: float = 100.0, **columns: Any) -> Samples:
        intended = begin + np.arange(round((end - begin) * rate)) / rate
        latency_s = columns.pop("latency_ms", 10.0) / 1e3
        known = {"sent": intended, "done": intended + latency_s, "outcome": 200, "retry_after": False, "version": "a"}
        known |= columns
        known.setdefault("good", np.asarray(known["outcome"]) == 200)
        return Samples(intended, **{key: np.broadcast_to(value, intended.shape) for key, value in known.items()})

    return samples
