"""Every finite float16 becomes the float32 that numpy makes of it."""

from typing import Any

import numpy as np
import pytest

from models.vectors import normalise, widen

BITS = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = BITS[np.isfinite(BITS)]


@pytest.mark.parametrize("halves", [FINITE, FINITE.astype(">f2"), FINITE.reshape(-1, 2).T])
def test_widens_every_half(halves: Any) -> None:
    wide = widen(halves)
    assert wide.dtype == np.float32
    assert np.array_equal(wide.view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_leaves_other_floats_as_they_are() -> None:
    assert widen(np.array([0.1, -2.5], np.float32)).tolist() == np.array([0.1, -2.5], np.float32).tolist()


def test_a_row_of_zeros_stays_zero() -> None:
    assert normalise(np.array([[3, 4], [0, 0]])).tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0]]
