"""The routing report finds a gain if features tell which net is better, and none if they do not."""

from __future__ import annotations

import numpy as np
import pytest

from bench.routing import features, measure
from models.vectors import normalise


@pytest.mark.parametrize(("tells", "gains"), [(True, True), (False, False)])
def test_gains_only_if_a_feature_tells_which_net_is_better(tells: bool, gains: bool) -> None:
    draw = np.random.default_rng(0)
    article = np.repeat(np.arange(100), 20)
    known = draw.standard_normal((2000, 3))
    difference = 0.05 * known[:, 0] if tells else 0.05 * draw.standard_normal(2000)
    cosines = 0.6 + np.stack([np.zeros(2000), difference + 0.002], axis=1)
    made = measure(known, cosines, article)
    assert (made.interval[0] > 0.01) == gains
    assert made.oracle >= made.learned
    assert made.learned == pytest.approx(max(made.each) + made.gain)


def test_features_do_not_depend_on_the_length_of_vectors() -> None:
    draw = np.random.default_rng(0)
    contexts = draw.standard_normal((4, 5, 8)).astype(np.float32)
    answers = tuple(normalise(draw.standard_normal((4, 8))) for _ in range(2))
    once, twice = (features(scale * contexts, (answers[0], answers[1])) for scale in (1, 2))
    np.testing.assert_allclose(once, twice, atol=1e-6)
    assert once.shape == (4, 10 + 1 + 1 + 4)
