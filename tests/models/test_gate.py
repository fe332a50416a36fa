"""Each check of the gate objects to its own fault only; a damaged version raises."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import gate
from models.evaluate import evaluate
from models.gate import (
    Contender,
    GateInput,
    IncompleteCard,
    NoData,
    NotAsCarded,
    Objection,
    OtherSpace,
    TooSlow,
    WorseThanIncumbent,
    are_comparable,
)
from models.predictor import load_predictor
from models.registry import manifest
from models.registry.card import CARD_FILE, Card, read_card
from models.registry.checkpoint import GOLDEN_FILE, BadCheckpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    Corpus,
)
from models.vectors import Floats, normalise
from models.windows import NoWindows

Made = Callable[..., Card]


def adopt(registry: Registry, version: Version, **changes: Any) -> Version:
    """Store a version with another card."""
    files = manifest.read_files(version.path)
    card = replace(Card.from_markdown(files[CARD_FILE].decode()), **changes)
    return registry.add(version.name, {**files, CARD_FILE: card.to_markdown().encode()})


def objections(registry: Registry, alias: str, version: Version, **data: Corpus) -> set[type[Objection]]:
    """Return the objections, except to latency, which depends on this machine."""
    return {type(each) for each in gate.judge(registry, alias, version, data).objections} - {TooSlow}


def scored(version: Version, by: float) -> dict[str, Any]:
    """Return the card's scores, each higher by `by`."""
    scores = read_card(version.path).scores
    return {name: {**score, "cosine": score["cosine"] + by} for name, score in scores.items()}


def test_a_sound_net_passes_with_its_figures(registry: Registry, amn_version: Version, other: Corpus) -> None:
    version = adopt(registry, amn_version)
    verdict = gate.judge(registry, "primary", version, {"other": other})
    assert verdict.objections == ()
    assert verdict.figures["incumbent"] is None
    figures = verdict.figures["scores"]["other"]
    assert figures["cosine"] == pytest.approx(figures["card"], abs=1e-4)
    assert verdict.figures["golden"]["contexts"] > 0
    assert verdict.figures["golden"]["worst_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "lack", [{"encoder": "unspecified"}, {"scores": {}}, {"reference": None}, {"limits": ()}, {"license": ""}]
)
def test_a_card_must_be_complete(
    registry: Registry, amn_version: Version, other: Corpus, lack: dict[str, object]
) -> None:
    version = adopt(registry, amn_version, **lack)
    assert objections(registry, "primary", version, other=other) == {IncompleteCard}


def test_a_score_without_counts_is_incomplete(registry: Registry, amn_version: Version) -> None:
    version = adopt(registry, amn_version, scores={"other": {**scored(amn_version, 0)["other"], "windows": None}})
    assert NoData in objections(registry, "primary", version)


def test_objects_to_scores_without_test_data(
    registry: Registry, amn_version: Version, make_corpus: Callable[..., Corpus], corpus_dir: Path
) -> None:
    version = adopt(registry, amn_version)
    strange = make_corpus(np.random.default_rng(0).standard_normal((9, 16)))
    assert objections(registry, "primary", version, strange=strange) == {NoData}


def test_uses_the_corpus_of_the_retriever(registry: Registry, amn_version: Version, corpus_version: Version) -> None:
    registry.point("retriever", adopt(registry, corpus_version))
    verdict = gate.judge(registry, "primary", adopt(registry, amn_version), {})
    assert verdict.objections == ()
    assert verdict.figures["scores"].keys() == {"tiny"}


@pytest.mark.parametrize("by", [0.002, -0.002, float("nan")])
def test_objects_to_scores_that_differ_from_the_card(
    registry: Registry, amn_version: Version, other: Corpus, by: float
) -> None:
    version = adopt(registry, amn_version, scores=scored(amn_version, by))
    assert objections(registry, "primary", version, other=other) == {NotAsCarded}


def test_objects_to_another_encoder_or_shape(registry: Registry, amn_version: Version, other: Corpus) -> None:
    version = adopt(registry, amn_version)
    strange = adopt(registry, amn_version, encoder="another")
    registry.point("primary", strange)
    assert objections(registry, "primary", version, other=other) == set()  # it takes the place of the strange one
    assert objections(registry, "fallback", version, other=other) == {OtherSpace}


def test_a_corpus_without_towers_takes_contexts_of_any_length(
    registry: Registry, amn_version: Version, corpus_version: Version
) -> None:
    registry.point("primary", adopt(registry, amn_version))
    known = {"command": "lvm corpus", "encoder": "tiny-encoder"}
    plain = adopt(registry, corpus_version, context_length=7, **known)
    assert objections(registry, "retriever", plain) == set()
    assert objections(registry, "retriever", adopt(registry, corpus_version, **{**known, "encoder": "x"})) == {
        OtherSpace
    }


def contender(says: Callable[[Floats], Floats], score: float, card: Card, name: str = "toy/1") -> Contender:
    return Contender(name, card, "cosine", says, lambda data: score)


@pytest.mark.parametrize(("score", "is_worse"), [(0.5, False), (0.496, False), (0.494, True), (float("nan"), True)])
def test_a_net_may_be_a_little_worse_than_the_incumbent(
    card: Made, other: Corpus, score: float, is_worse: bool
) -> None:
    counts = {"windows": 90, "articles": 6, "chunks": 120, "cosine": score}
    ours, theirs = (
        contender(lambda contexts: contexts[:, 0], value, card(scores={"other": counts})) for value in (score, 0.5)
    )
    case = GateInput(ours, theirs, {}, {"other": other})
    if is_worse:
        with pytest.raises(WorseThanIncumbent, match=r"tolerated: 0\.005; 0\.4950 would pass"):
            gate.check_incumbent(case)
    else:
        assert gate.check_incumbent(case) == {"other": {"cosine": 0.5}}


def test_scores_the_incumbent_on_the_same_data(
    registry: Registry, amn_version: Version, gru_version: Version, other: Corpus
) -> None:
    registry.point("primary", adopt(registry, amn_version))
    known = read_card(amn_version.path)
    net = load_predictor(gru_version.path, "cpu")
    scores = {"other": evaluate(net, other, 5)}
    stated = {name: getattr(known, name) for name in ("command", "reference", "limits")}
    worse = adopt(registry, gru_version, scores=scores, **stated)
    assert scores["other"]["cosine"] < known.scores["other"]["cosine"] - gate.MAX_SCORE_LOSS
    assert objections(registry, "primary", worse, other=other) == {WorseThanIncumbent}


def test_objects_to_a_much_slower_net(card: Made) -> None:
    """The slow one computes fifty times as much. CPU time counts, not the load of the machine."""

    def slow(contexts: Floats) -> Floats:
        return [normalise(contexts)[:, 0] for _ in range(50)][-1]

    quick = contender(lambda contexts: normalise(contexts)[:, 0], 0, card())
    with pytest.raises(TooSlow, match="times as long, tolerated: 2"):
        gate.check_latency(GateInput(contender(slow, 0, card()), quick, {}, {}))
    assert gate.check_latency(GateInput(quick, contender(slow, 0, card()), {}, {})).keys() == {"1", "128"}
    assert gate.check_latency(GateInput(contender(slow, 0, card()), None, {}, {})) == {}


def test_never_compares_candidates(
    registry: Registry, amn_version: Version, gru_version: Version, other: Corpus
) -> None:
    registry.point("candidate", adopt(registry, amn_version))
    verdict = gate.judge(registry, "candidate", adopt(registry, gru_version), {"other": other})
    assert {type(each) for each in verdict.objections} == {IncompleteCard}


@pytest.mark.parametrize("lost", ["file", "version"])
def test_ignores_a_damaged_incumbent(registry: Registry, amn_version: Version, other: Corpus, lost: str) -> None:
    broken = adopt(registry, amn_version, attribution="broken")
    registry.point("primary", broken)
    path = broken.path if lost == "version" else broken.path / GOLDEN_FILE
    path.rename(registry.root / "lost")
    assert objections(registry, "primary", adopt(registry, amn_version), other=other) == set()


def test_raises_for_a_damaged_version(registry: Registry, amn_version: Version) -> None:
    broken = adopt(registry, amn_version)
    (broken.path / GOLDEN_FILE).unlink()
    with pytest.raises(BadCheckpoint):
        gate.judge(registry, "primary", broken, {})
    with pytest.raises(BadCheckpoint, match="kind net, expected corpus"):
        gate.judge(registry, "retriever", adopt(registry, amn_version, attribution="whole"), {})


def test_a_bundle_is_scored_as_it_retrieves(registry: Registry, bundle_version: Version) -> None:
    command = {"command": "lvm corpus"}
    card = read_card(bundle_version.path)
    registry.point("retriever", adopt(registry, bundle_version, **command))
    verdict = gate.judge(registry, "retriever", adopt(registry, bundle_version, command="again"), {})
    assert {type(each) for each in verdict.objections} <= {TooSlow}
    assert verdict.figures["incumbent_scores"] == {card.name: {"R@5": verdict.figures["scores"][card.name]["R@5"]}}
    score = card.scores[card.name]
    without = {**score["retrieval"]["without_context"], "R@5": 0.5}
    proud = {card.name: {**score, "retrieval": {**score["retrieval"], "without_context": without}}}
    assert objections(registry, "retriever", adopt(registry, bundle_version, **command, scores=proud)) == {NotAsCarded}


def test_never_compares_bundles_of_different_corpora(card: Made, make_corpus: Any) -> None:
    one, other = (make_corpus(np.random.default_rng(seed).standard_normal((9, 16))) for seed in (0, 1))
    bundles = [Contender(str(home), card(), "R@5", len, lambda data: 0, home) for home in (one, one, other)]
    assert are_comparable(bundles[0], bundles[1])
    assert not are_comparable(bundles[0], bundles[2])


def test_raises_for_a_data_set_without_windows(
    registry: Registry, amn_version: Version, make_corpus: Callable[..., Corpus]
) -> None:
    short = make_corpus(np.eye(16)[:3])
    with pytest.raises(NoWindows):
        gate.judge(registry, "primary", adopt(registry, amn_version), {"short": short})


def test_the_gate_imports_no_torch() -> None:
    code = "import sys, models.gate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
