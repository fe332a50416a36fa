"""A bundle is one unit: towers, what they make of a corpus, and the reranker of just these towers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from models.evaluate import retrieval_ranks
from models.gate import judge
from models.predictor import load_predictor
from models.registry.card import CARD_FILE, Card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.retrieval.index import BadIndex
from models.retrieval.reranker import NEIGHBOUR_COUNT, RERANK_DEPTH, RERANKER_FILE
from models.retrieval.retriever import Retriever, Search, load_retriever
from models.retrieval.towers import PAYLOAD_FILE, TOWER_INDEX_FILE
from models.training import bundle
from models.training.indexing import MeasuredLists
from models.training.neighbours import exact_neighbours
from models.training.publish_corpus import publish_corpus
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


def test_towers_are_scored_by_the_cosine_of_queries_and_passages_too(towers_version: Version, other: Corpus) -> None:
    made, data = bundle.read(towers_version), windows(other, 5)
    cosines = np.sum(made.query.run(data.contexts()) * made.payload(data.targets()), axis=1)
    assert made.score(other)["passage_cosine"] == pytest.approx(float(cosines.mean()), abs=1e-6)


def test_a_given_query_is_searched_as_the_encoder_sees_it(retriever: Retriever, other: Corpus) -> None:
    query = other.vectors[45]
    assert rows_of(retriever, Search(query, 5)) == np.argsort(-(other.vectors @ query), kind="stable")[:5].tolist()


def test_reranking_changes_the_order_and_nothing_else(retriever: Retriever, other: Corpus) -> None:
    context = other.vectors[40:45]
    plain = retriever.search_batch([Search(None, 100, (), context, context, rerank=False)])[0]
    reranked = retriever.search_batch([Search(None, 100, (), context, context)])[0]
    assert [hit.row for hit in plain] != [hit.row for hit in reranked]
    assert sorted(hit[:3] for hit in plain) == sorted(hit[:3] for hit in reranked)
    assert rows_of(retriever, Search(None, 3, (), context, context)) == [hit.row for hit in reranked][:3]
    assert not {hit.row for hit in reranked} & set(range(40, 45))


def test_a_filter_leaves_the_candidates_that_match(retriever: Retriever, other: Corpus) -> None:
    """The reranker orders the first hundred of them."""
    context = other.vectors[40:45]
    article = int(other.article[100])
    kept = set(np.flatnonzero(other.article == article).tolist())
    every = [hit.row for hit in retriever.search_batch([Search(None, 120, (), context, context, False)])[0]]
    search = Search(None, 120, (), context, context, False, {"article": [article]})
    assert rows_of(retriever, search) == [row for row in every if row in kept]
    assert set(rows_of(retriever, replace(search, rerank=True))) == kept - set(range(40, 45))
    assert rows_of(retriever, replace(search, exclude=sorted(kept), rerank=True)) == []


def test_mmr_begins_with_the_first_of_the_reranked(retriever: Retriever, other: Corpus) -> None:
    context = other.vectors[40:45]
    reranked = rows_of(retriever, Search(None, 20, (), context, context))
    search = Search(None, 20, (), context, context, mmr=1.0)
    assert rows_of(retriever, search) == reranked
    diverse = rows_of(retriever, replace(search, mmr=0.3))
    assert diverse[0] == reranked[0]
    assert diverse != reranked
    assert len(set(diverse)) == 20


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
    version = publish_corpus(
        registry, corpus_dir, card(name="more", kind="corpus", dim=0), extension=bundle.BundleParts(made)
    )
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


def test_rejects_a_reranker_of_other_towers(towers_version: Version, reranker_version: Version) -> None:
    made = bundle.read(towers_version)
    made.id = "two-tower/another"
    with pytest.raises(BadCheckpoint, match="was trained on results of"):
        bundle.BundleParts(made, reranker_version)
    with pytest.raises(BadCheckpoint, match="is not a reranker"):
        bundle.BundleParts(made, towers_version)


def test_rejects_a_corpus_of_another_encoder(
    registry: Registry, towers_version: Version, corpus_dir: Path, card: Callable[..., Card]
) -> None:
    other = card(name="x", kind="corpus", encoder="another")
    with pytest.raises(BadCheckpoint, match="the towers read D = 16, tiny-encoder"):
        publish_corpus(registry, corpus_dir, other, extension=bundle.BundleParts(bundle.read(towers_version)))


def test_a_net_holds_no_towers_and_towers_are_no_net(amn_version: Version, towers_version: Version) -> None:
    with pytest.raises(BadCheckpoint, match=r"holds no towers: it lacks payload.safetensors"):
        bundle.read(amn_version)
    with pytest.raises(BadCheckpoint, match="expected net"):
        load_predictor(towers_version.path, device="cpu")


def test_neighbours_are_the_largest_cosines_to_others() -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0].astype(np.float32)
    vectors[7] = vectors[3]
    found = exact_neighbours(vectors)
    assert found.shape == (20, NEIGHBOUR_COUNT)
    assert found[3, 0] == pytest.approx(1)
    assert found[4, 0] == pytest.approx(0, abs=1e-6)
    assert exact_neighbours(vectors[:4])[0, 3:].tolist() == [-1] * (NEIGHBOUR_COUNT - 3)


def test_without_a_reranker_the_towers_serve_alone(
    registry: Registry, towers_version: Version, other_dir: Path, card: Callable[..., Card]
) -> None:
    made = bundle.read(towers_version)
    plain = publish_corpus(
        registry, other_dir, card(name="plain", kind="corpus", dim=0), extension=bundle.BundleParts(made)
    )
    retriever = load_retriever(plain.path)
    assert not retriever.reranks
    assert RERANKER_FILE not in {path.name for path in plain.path.iterdir()}
    assert replace(retriever.card, name="plain").config == {"towers": towers_version.id}


# Bundles on disk


@pytest.fixture(scope="module")
def mapped_version(
    published: Registry, towers_version: Version, reranker_version: Version, larger_dir: Path, card: Callable[..., Card]
) -> Version:
    """A bundle of 1,200 chunks with approximate indexes."""
    parts = bundle.BundleParts(bundle.read(towers_version), reranker_version)
    blank = card(name="mapped", kind="corpus", dim=0, command="lvm corpus mapped")
    return publish_corpus(published, larger_dir, blank, "ivf", extension=parts)


@pytest.fixture(scope="module")
def mapped(mapped_version: Version) -> Retriever:
    return load_retriever(mapped_version.path)


@pytest.fixture(scope="module")
def flat(
    published: Registry, towers_version: Version, reranker_version: Version, larger_dir: Path, card: Callable[..., Card]
) -> Retriever:
    """The same bundle with exact indexes."""
    parts = bundle.BundleParts(bundle.read(towers_version), reranker_version)
    made = publish_corpus(published, larger_dir, card(name="flat", kind="corpus", dim=0), "flat", extension=parts)
    return load_retriever(made.path)


def test_a_bundle_on_disk_finds_what_one_in_memory_finds(mapped: Retriever, flat: Retriever) -> None:
    contexts = [flat.corpus.vectors_at(np.arange(row, row + 5)) for row in range(0, 1000, 40)]
    for rerank in (False, True):
        searches = [Search(None, 10, (), context, context, rerank=rerank) for context in contexts]
        found = [set(rows_of(mapped, search)) for search in searches]
        expected = [set(rows_of(flat, search)) for search in searches]
        shared = sum(len(one & other) for one, other in zip(found, expected, strict=True))
        assert shared >= 0.95 * sum(map(len, expected))
    assert not mapped.towers.index.is_exact  # type: ignore[union-attr]


def test_a_bundle_on_disk_leaves_vectors_and_neighbours_there(mapped: Retriever) -> None:
    assert mapped.towers
    assert not mapped.towers.neighbours.flags.owndata
    assert mapped.towers.neighbours.flags.writeable is False


def test_the_card_of_a_bundle_on_disk_has_both_indexes_and_what_was_drawn(mapped: Retriever) -> None:
    config = mapped.card.config
    assert config.keys() >= {"towers", "reranker", "index", "nprobe", "payload", f"neighbours_recall@{NEIGHBOUR_COUNT}"}
    assert config["payload"].keys() == {"index", "lists", "nprobe", "pool", "recall@10", "queries"}
    limits = " ".join(mapped.card.limits)
    assert "Search is approximate" in limits
    assert "Search by context is approximate" in limits
    assert "drawn from" not in limits  # the corpus has no more than 900 windows
    (scores,) = mapped.card.scores.values()
    assert scores["windows"] == 900
    assert scores["baselines"].keys() == {"towers alone", "persistence", "mean", "weighted_mean"}


def test_stopped_work_on_a_bundle_continues(
    registry: Registry, towers_version: Version, larger_dir: Path, card: Callable[..., Card]
) -> None:
    parts = bundle.BundleParts(bundle.read(towers_version))
    total: list[int] = []

    def stop(done: int, all_steps: int) -> None:
        total.append(all_steps)
        if done == 15:
            raise KeyboardInterrupt

    blank = card(name="stopped", kind="corpus", dim=0)
    with pytest.raises(KeyboardInterrupt):
        publish_corpus(registry, larger_dir, blank, "ivf", stop, parts)
    kept = {path.name for path in (registry.root / ".stopped.parts").iterdir()}
    assert len(kept) == 15
    ticks: list[tuple[int, int]] = []
    version = publish_corpus(registry, larger_dir, blank, "ivf", lambda *tick: ticks.append(tick), parts)
    assert set(total) == {ticks[-1][1]}
    assert ticks[-1][0] == ticks[-1][1]
    assert load_retriever(version.path).query_maker
    assert not (registry.root / ".stopped.parts").exists()


def test_the_gate_scores_a_bundle_on_disk_as_its_card_does(published: Registry, mapped_version: Version) -> None:
    verdict = judge(published, "retriever", mapped_version, {})
    assert verdict.objections == ()
    assert verdict.figures["scores"].keys() == {"mapped"}


def test_rejects_a_bundle_on_disk_whose_card_lacks_the_parameters_of_the_payload(
    mapped_version: Version, copy_of: Callable[[Version], Path], rewrite_checksums: Callable[[Path], None]
) -> None:
    directory = copy_of(mapped_version)
    text = (directory / CARD_FILE).read_text()
    (directory / CARD_FILE).write_text(text.replace("payload:", "payload_of_old:", 1))
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match="expected nprobe and pool"):
        load_retriever(directory)


def test_a_payload_whose_lists_find_too_little_is_searched_exactly(
    registry: Registry, towers_version: Version, larger_dir: Path, card: Callable[..., Card]
) -> None:
    def reject(*_: object) -> MeasuredLists:
        raise BadIndex("recall is low")

    parts = bundle.BundleParts(bundle.read(towers_version), None, reject)
    version = publish_corpus(registry, larger_dir, card(name="x", kind="corpus", dim=0), "ivf", extension=parts)
    retriever = load_retriever(version.path)
    assert (retriever.index.is_exact, retriever.indexes["payload"].is_exact) == (False, True)
    assert "exact and holds all payload vectors in memory (recall is low)" in " ".join(retriever.card.limits)
