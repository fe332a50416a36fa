"""A bundle is one unit: towers, what they make of a corpus, and the reranker of just these towers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from models.evaluate import retrieval_ranks
from models.predictor import load_predictor
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.retrieval.reranker import NEIGHBOUR_COUNT, RERANK_DEPTH, RERANKER_FILE
from models.retrieval.retriever import Retriever, Search, load_retriever
from models.retrieval.towers import PAYLOAD_FILE, TOWER_INDEX_FILE
from models.training import bundle, publish
from models.vectors import Floats
from models.windows import windows


@pytest.fixture(scope="module")
def retriever(bundle_version: Version) -> Retriever:
    return load_retriever(bundle_version.path)


def rows_of(retriever: Retriever, search: Search) -> list[int]:
    return [hit.row for hit in retriever.search_batch([search])[0]]


def test_a_bundle_names_its_parts(retriever: Retriever, towers_version: Version, bundle_version: Version) -> None:
    assert retriever.query_maker == (towers_version.name, towers_version.version)
    assert retriever.reranks
    assert (retriever.name, retriever.version) == ("passages", bundle_version.version)
    assert f"Bundled with `{towers_version.id}` and `reranker/" in retriever.card.to_markdown()
    retriever.warm_up()


def test_a_context_is_searched_as_the_towers_see_it(
    retriever: Retriever, towers_version: Version, other: Corpus, contexts: Callable[..., Floats]
) -> None:
    made = bundle.read(towers_version)
    context = contexts(1)[0]
    scores = made.payload(other.vectors) @ made.query.run(context[None])[0]
    expected = np.argsort(-scores, kind="stable")[:10].tolist()
    assert rows_of(retriever, Search(None, 10, context=context, rerank=False)) == expected


def test_a_given_query_is_searched_as_the_encoder_sees_it(retriever: Retriever, other: Corpus) -> None:
    query = other.vectors[45]
    assert rows_of(retriever, Search(query, 5)) == np.argsort(-(other.vectors @ query), kind="stable")[:5].tolist()


def test_reranking_changes_the_order_and_nothing_else(retriever: Retriever, other: Corpus) -> None:
    context = other.vectors[40:45]
    plain = retriever.search_batch([Search(None, 100, (), context, context, rerank=False)])[0]
    reranked = retriever.search_batch([Search(None, 100, (), context, context)])[0]
    assert [hit.row for hit in plain] != [hit.row for hit in reranked]
    assert sorted(plain) == sorted(reranked)
    assert rows_of(retriever, Search(None, 3, (), context, context)) == [hit.row for hit in reranked][:3]
    assert not {hit.row for hit in reranked} & set(range(40, 45))


def test_what_the_caller_has_already_is_put_behind_what_is_new(retriever: Retriever, other: Corpus) -> None:
    context = other.vectors[40:45]
    everything = rows_of(retriever, Search(None, 120, context=context))
    assert set(everything[RERANK_DEPTH - 5 : RERANK_DEPTH]) == set(range(40, 45))
    assert sorted(everything) == list(range(120))


def test_the_length_of_a_context_does_not_matter(retriever: Retriever, other: Corpus) -> None:
    """Nor does it overflow, or come to nothing that is finite."""
    context = other.vectors[40:45]
    unit = rows_of(retriever, Search(None, 20, (), context, context))
    assert rows_of(retriever, Search(None, 20, (), 1e9 * context, 1e9 * context)) == unit
    hits = retriever.search_batch([Search(None, 20, context=0 * context)])[0]
    assert np.isfinite([hit.score for hit in hits]).all()


def test_a_batch_of_every_kind_of_search_is_each_of_them(retriever: Retriever, other: Corpus) -> None:
    context = other.vectors[20:25]
    kinds = [
        Search(other.vectors[3], 4),
        Search(None, 5, (), context, context),
        Search(other.vectors[9], 2, exclude=[9]),
        Search(None, 3, context=context, rerank=False),
    ]
    assert retriever.search_batch(kinds) == [retriever.search_batch([kind])[0] for kind in kinds]


def test_reports_each_stage_when_it_ends(retriever: Retriever, other: Corpus) -> None:
    def stages(search: Search) -> list[str]:
        laps: list[str] = []
        retriever.search_batch([search], laps.append)
        return laps

    context = other.vectors[20:25]
    assert stages(Search(other.vectors[0], 1)) == ["search"]
    assert stages(Search(None, 1, context=context, rerank=False)) == ["infer", "search"]
    assert stages(Search(None, 1, context=context)) == ["infer", "search", "rerank"]


def test_its_card_has_the_scores_of_the_bundle_beside_those_of_the_towers(
    retriever: Retriever, bundle_version: Version, other: Corpus
) -> None:
    (scores,) = retriever.card.scores.values()
    assert scores["baselines"].keys() >= {"towers alone", "persistence"}
    again = bundle.read(bundle_version).score(other)
    assert again["retrieval"]["without_context"]["MRR"] == pytest.approx(
        scores["retrieval"]["without_context"]["MRR"], abs=1e-4
    )
    found = retrieval_ranks(retriever, windows(other, 5), exclude_context=True)
    assert again["retrieval"]["without_context"]["R@5"] == np.mean(found <= 5)


def test_a_bundle_makes_a_bundle_of_another_corpus(
    registry: Registry, retriever: Retriever, bundle_version: Version, corpus_dir: Path, card: Callable[..., Card]
) -> None:
    made = bundle.read(bundle_version)
    version = publish.publish_bundle(registry, corpus_dir, card(name="more", kind="corpus", dim=0), made, None)
    again = load_retriever(version.path)
    assert (len(again.corpus), again.reranks, again.query_maker) == (
        240,
        True,
        load_retriever(bundle_version.path).query_maker,
    )


def test_rejects_an_index_of_another_payload_tower(
    bundle_version: Version, copy_of: Callable[[Version], Path], rewrite_checksums: Callable[[Path], None]
) -> None:
    """Sealed anew, as one would who swaps the tower: the index still names the one that made it."""
    directory = copy_of(bundle_version)
    payload = load((directory / PAYLOAD_FILE).read_bytes())
    (directory / PAYLOAD_FILE).write_bytes(save({name: 2 * tensor for name, tensor in payload.items()}))
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match="not built by the payload tower"):
        load_retriever(directory)


@pytest.mark.parametrize("part", ["vectors", "neighbours", "payload_sha256"])
def test_rejects_a_broken_index(
    bundle_version: Version, copy_of: Callable[[Version], Path], rewrite_checksums: Callable[[Path], None], part: str
) -> None:
    def broken(**changes: object) -> Path:
        directory = copy_of(bundle_version)
        parts = {**load((directory / TOWER_INDEX_FILE).read_bytes()), **changes}
        kept = {name: array for name, array in parts.items() if isinstance(array, np.ndarray)}
        (directory / TOWER_INDEX_FILE).write_bytes(save(kept))
        rewrite_checksums(directory)
        return directory

    with pytest.raises(BadCheckpoint, match="unreadable index"):
        load_retriever(broken(**{part: None}))


def test_rejects_an_index_of_another_corpus(
    bundle_version: Version, copy_of: Callable[[Version], Path], rewrite_checksums: Callable[[Path], None]
) -> None:
    directory = copy_of(bundle_version)
    parts = load((directory / TOWER_INDEX_FILE).read_bytes())
    (directory / TOWER_INDEX_FILE).write_bytes(save({**parts, "vectors": parts["vectors"][1:]}))
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match="the corpus has 120 passages"):
        load_retriever(directory)


def test_rejects_a_reranker_of_other_towers(
    registry: Registry, towers_version: Version, reranker_version: Version, corpus_dir: Path, card: Callable[..., Card]
) -> None:
    made = bundle.read(towers_version)
    made.id = "two-tower/another"
    with pytest.raises(BadCheckpoint, match="was trained on results of"):
        publish.publish_bundle(registry, corpus_dir, card(name="x", kind="corpus"), made, reranker_version)
    with pytest.raises(BadCheckpoint, match="is not a reranker"):
        publish.publish_bundle(registry, corpus_dir, card(name="x", kind="corpus"), made, towers_version)


def test_rejects_a_corpus_of_another_encoder(
    registry: Registry, towers_version: Version, corpus_dir: Path, card: Callable[..., Card]
) -> None:
    other = card(name="x", kind="corpus", encoder="another")
    with pytest.raises(BadCheckpoint, match="the towers read D = 16, tiny-encoder"):
        publish.publish_bundle(registry, corpus_dir, other, bundle.read(towers_version), None)


def test_a_net_holds_no_towers_and_towers_are_no_net(amn_version: Version, towers_version: Version) -> None:
    with pytest.raises(BadCheckpoint, match=r"holds no towers: it lacks payload.safetensors"):
        bundle.read(amn_version)
    with pytest.raises(BadCheckpoint, match="expected net"):
        load_predictor(towers_version.path, device="cpu")


def test_neighbours_are_the_largest_cosines_to_others() -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0].astype(np.float32)
    vectors[7] = vectors[3]
    found = bundle.neighbours_of(vectors)
    assert found.shape == (20, NEIGHBOUR_COUNT)
    assert found[3, 0] == pytest.approx(1)
    assert found[4, 0] == pytest.approx(0, abs=1e-6)
    assert bundle.neighbours_of(vectors[:4])[0, 3:].tolist() == [-1] * (NEIGHBOUR_COUNT - 3)


def test_without_a_reranker_the_towers_serve_alone(
    registry: Registry, towers_version: Version, other_dir: Path, card: Callable[..., Card]
) -> None:
    made = bundle.read(towers_version)
    plain = publish.publish_bundle(registry, other_dir, card(name="plain", kind="corpus", dim=0), made, None)
    retriever = load_retriever(plain.path)
    assert not retriever.reranks
    assert RERANKER_FILE not in {path.name for path in plain.path.iterdir()}
    assert replace(retriever.card, name="plain").config == {"towers": towers_version.id}
