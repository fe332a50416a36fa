"""`lvm promote --evidence`: what a running service shows of a candidate is held against its promotion."""

from __future__ import annotations

import numpy as np
import pytest

from lvm.cli.evidence import TooFewPairs, weigh
from models.gate import WorseThanIncumbent
from service.deploy.shadow_report import differences
from service.telemetry.metrics import Metrics
from tests import scraping

CANDIDATE, PRIMARY = "gmn/v2", "amn/v1"


def scrape(mean: float, pairs: int, against: str = PRIMARY) -> str:
    """Return the text of /metrics of a service that found differences of this mean, with a deviation of 0.05."""
    metrics = Metrics()
    draw = np.random.default_rng(0)
    spread = draw.normal(0, 0.05, pairs)
    for level, some in zip(("low", "middle", "high"), np.array_split(spread - spread.mean() + mean, 3), strict=True):
        metrics.shadow_difference.labels("gmn", "v2", against, level).observe(*some.tolist())
    return scraping.scrape(metrics)[0].decode()


def test_differences_are_summed_over_the_coherences() -> None:
    found = differences(scrape(0.01, 3000), CANDIDATE, PRIMARY)
    assert found.keys() == {"all", "low", "middle", "high"}
    assert (found["all"].pairs, found["low"].pairs) == (3000, 1000)
    assert found["all"].mean == pytest.approx(0.01, abs=1e-6)
    # 1.96 * 0.05 / sqrt(3000), and what the buckets add
    assert found["all"].interval[1] - found["all"].mean == pytest.approx(0.0018, abs=0.0002)


def test_a_better_candidate_meets_no_objection() -> None:
    evidence = weigh(scrape(0.01, 3000), CANDIDATE, PRIMARY, 500)
    assert not evidence.objections
    assert evidence.figures["pairs"] == 3000
    assert "+0.0100" in evidence.sentence
    assert "amn/v1 on 3000 contexts" in evidence.sentence


@pytest.mark.parametrize(("mean", "pairs"), [(-0.02, 3000), (0.0, 50)])
def test_what_may_be_worse_is_objected_to(mean: float, pairs: int) -> None:
    (objection,) = weigh(scrape(mean, pairs), CANDIDATE, PRIMARY, 50).objections
    assert isinstance(objection, WorseThanIncumbent)


@pytest.mark.parametrize("against", [PRIMARY, "amn/v0"])
def test_too_few_pairs_or_pairs_with_another_primary_are_no_evidence(against: str) -> None:
    pairs = 300 if against == PRIMARY else 3000
    (objection,) = weigh(scrape(0.01, pairs, against), CANDIDATE, PRIMARY, 500).objections
    assert isinstance(objection, TooFewPairs)
    assert "--min-pairs is 500" in str(objection)
