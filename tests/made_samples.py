"""Samples made up: what a service would have done."""

from typing import Any

import numpy as np

from loadtest.samples import Samples


def make(begin: float, end: float, rate: float = 100.0, **columns: Any) -> Samples:
    """Return `rate` requests per second from `begin` to `end`, good and 10 ms each, but for the columns given."""
    intended = begin + np.arange(round((end - begin) * rate)) / rate
    latency_s = columns.pop("latency_ms", 10.0) / 1e3
    known = {"fired": intended, "sent": intended, "done": intended + latency_s, "outcome": 200, "retry_after": False}
    known |= {"version": "a", "served_by": "a", **columns}
    known.setdefault("good", np.asarray(known["outcome"]) == 200)
    return Samples(intended, **{key: np.broadcast_to(value, intended.shape) for key, value in known.items()})
