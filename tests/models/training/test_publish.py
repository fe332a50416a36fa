"""What a card says of a version is what its stored files do; nothing is published that answers otherwise."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load
from torch import nn

from models.diagnose import card_diagnosis
from models.evaluate import evaluate
from models.nets import config_dict
from models.predictor import load_predictor
from models.registry import manifest
from models.registry.card import Card
from models.registry.checkpoint import BadCheckpoint, load_checkpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import (
    CORPUS_FILES,
    PASSAGES_FILE,
    SPANS_FILE,
    VECTORS_FILE,
    BadCorpus,
    Corpus,
    read_corpus,
    write_corpus,
)
from models.retrieval.fields import FIELDS_FILE, Column, Fields, Texts
from models.retrieval.retriever import load_retriever
from models.runtimes import UnfitRuntime
from models.runtimes.torch import build_net, run_net
from models.training.publish import GOLDEN, golden_contexts, publish, reference_of
from models.training.publish_corpus import FLAT_ROWS, publish_corpus
from models.vectors import normalise
from models.windows import windows


def leaves(scores: Any, path: str = "") -> dict[str, float]:
    if not isinstance(scores, dict):
        return {path: scores}
    return {k: v for key, value in scores.items() for k, v in leaves(value, f"{path}/{key}").items()}


def test_the_cards_scores_are_those_of_the_stored_version(amn_version: Version, corpus: Corpus, other: Corpus) -> None:
    served = load_predictor(amn_version.path, device="cpu")
    assert list(served.card.scores) == ["other", "tiny"]
    for name, data in {"other": other, "tiny": corpus}.items():
        diagnosis = card_diagnosis(served.predict_batch, data, 5)
        assert diagnosis["verdict"] == served.card.scores[name]["diagnosis"]["verdict"]
        fresh = leaves({**evaluate(served, data, 5, corpus), "diagnosis": {"cosine": diagnosis["cosine"]}})
        carded = {
            path: figure
            for path, figure in leaves(served.card.scores[name]).items()
            if not path.startswith("/diagnosis") or path.startswith("/diagnosis/cosine")
        }
        assert carded.keys() == fresh.keys()
        for path, figure in fresh.items():
            assert carded[path] == pytest.approx(figure, abs=1e-4), path


def test_articles_without_what_follows_a_window_give_no_diagnosis(
    registry: Registry,
    tiny_net: Callable[..., nn.Module],
    card: Callable[..., Card],
    make_corpus: Callable[..., Corpus],
) -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 16))
    short = make_corpus(vectors, np.repeat(np.arange(10), 6), np.tile(np.arange(6), 10))
    golden = golden_contexts(short, 16, 5)
    version = publish(registry, tiny_net("amn"), card(), golden, {"short": short})
    assert "diagnosis" not in load_checkpoint(version.path).card.scores["short"]


def test_the_golden_vectors_are_the_torch_nets_answers(gru_version: Version, gru_net: nn.Module) -> None:
    checkpoint = load_checkpoint(gru_version.path)
    assert np.array_equal(checkpoint.golden_vector, run_net(gru_net, checkpoint.golden_context))
    assert np.array_equal(run_net(build_net(checkpoint), checkpoint.golden_context), checkpoint.golden_vector)
    served = load_predictor(gru_version.path, device="cpu")
    assert np.allclose(served.predict_batch(checkpoint.golden_context), checkpoint.golden_vector, atol=1e-5)


def test_the_cards_sizes_are_read_off_the_net(gru_version: Version, gru_net: nn.Module) -> None:
    card = load_checkpoint(gru_version.path).card
    assert (card.architecture, card.dim, card.context_length) == ("gru", 16, 5)
    assert card.config == config_dict(gru_net)
    assert card.parameters == sum(p.numel() for p in gru_net.parameters())
    assert card.scores == {}


def test_a_version_holds_its_files_and_no_more(gru_version: Version) -> None:
    names = {path.name for path in gru_version.path.iterdir()}
    assert names == {"README.md", "weights.safetensors", "net.onnx", "golden.safetensors", manifest.CHECKSUMS_FILE}
    assert gru_version.version.split("-")[1] == manifest.read_digest(gru_version.path)[:12]


def test_the_graph_is_valid_without_weights_and_machine_details(gru_version: Version) -> None:
    graph = (gru_version.path / "net.onnx").read_bytes()
    onnx.checker.check_model(str(gru_version.path / "net.onnx"))
    assert b"/work" not in graph
    assert b"site-packages" not in graph
    model = onnx.load_model_from_string(graph)
    assert [i.name for i in model.graph.input] == ["context"]
    assert [o.name for o in model.graph.output] == ["vector"]
    batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert [d.dim_value for d in rest] == [5, 16]
    weights = load((gru_version.path / "weights.safetensors").read_bytes())
    outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert outside <= set(weights)
    assert outside
    assert all(t.name in outside or len(t.raw_data) < 64 for t in model.graph.initializer)


def test_rejects_a_net_with_a_weight_that_is_not_finite(
    registry: Registry, tiny_net: Callable[..., nn.Module], card: Callable[..., Card]
) -> None:
    net: Any = tiny_net("amn")
    with torch.no_grad():
        net.query_encoder.weight[0, 0] = torch.nan
    with pytest.raises(BadCheckpoint, match=r"not finite: query_encoder\.weight"):
        publish(registry, net, card(), golden_contexts(None, 16, 5), {})
    assert registry.versions() == []


def test_rejects_an_export_with_other_answers(
    registry: Registry, tiny_net: Callable[..., nn.Module], card: Callable[..., Card]
) -> None:
    """Served otherwise than trained: what the golden vectors are there to find."""
    net = tiny_net("lstm")
    net.register_forward_pre_hook(lambda _, given: given[0].flip(1) if torch.compiler.is_exporting() else None)
    with pytest.raises(UnfitRuntime, match=r"onnxruntime: cosine -?0\.\d+ to the golden vectors"):
        publish(registry, net, card(), golden_contexts(None, 16, 5), {})
    assert registry.versions() == []


# Golden contexts and reference statistics


def test_golden_contexts_are_real_ones_spread_over_the_corpus(corpus: Corpus) -> None:
    golden = golden_contexts(corpus, 16, 5)
    data = windows(corpus, 5).contexts()
    assert golden.shape == (GOLDEN, 5, 16)
    rows = [int(np.flatnonzero((data == context).all(axis=(1, 2)))[0]) for context in golden]
    assert rows[0] == 0
    assert rows[-1] == len(data) - 1
    assert rows == sorted(set(rows))


def test_golden_contexts_without_a_corpus_are_seeded_unit_vectors() -> None:
    golden = golden_contexts(None, 24, 3)
    assert golden.shape == (GOLDEN, 3, 24)
    assert golden.dtype == np.float32
    assert np.array_equal(golden, golden_contexts(None, 24, 3))
    assert np.allclose(np.linalg.norm(golden, axis=2), 1, atol=1e-6)


def test_a_small_corpus_gives_fewer_golden_contexts(make_corpus: Callable[..., Corpus]) -> None:
    assert golden_contexts(make_corpus(np.eye(8)), 8, 5).shape == (3, 5, 8)


def test_the_reference_is_of_neighbours_inside_an_article(make_corpus: Callable[..., Corpus]) -> None:
    vectors = [[1, 0], [0.6, 0.8], [0, 1], [-1, 0]]
    reference = reference_of(make_corpus(vectors, [1, 1, 2, 2], [0, 1, 0, 1]))
    assert reference.norm == pytest.approx((1, 0), abs=1e-6)
    assert reference.neighbour_cosine == pytest.approx((0.3, 0.3), abs=1e-6)  # 0.6 and 0, not 0.8 across


# Corpora


def test_a_corpus_is_stored_byte_for_byte_with_its_counts(corpus_version: Version, corpus_dir: Path) -> None:
    files = manifest.read_files(corpus_version.path)
    assert all(files[name] == (corpus_dir / name).read_bytes() for name in CORPUS_FILES)
    card = Card.from_markdown(files["README.md"].decode())
    assert (card.kind, card.dim, card.data) == ("corpus", 16, {"chunks": 240, "articles": 12})


def test_a_corpus_that_cannot_be_read_is_not_stored(
    registry: Registry, corpus_dir: Path, tmp_path: Path, card: Callable[..., Card]
) -> None:
    for name in CORPUS_FILES:
        (tmp_path / name).write_bytes((corpus_dir / name).read_bytes())
    buffer = io.BytesIO()
    np.save(buffer, np.full((240, 16), np.nan, np.float16))
    (tmp_path / VECTORS_FILE).write_bytes(buffer.getvalue())
    with pytest.raises(BadCorpus, match="vector 0 is not finite"):
        publish_corpus(registry, tmp_path, card(name="broken", kind="corpus"))
    assert registry.versions() == []


def test_an_indexed_corpus_is_stored_with_its_text_to_be_mapped(indexed_version: Version, larger_dir: Path) -> None:
    files = manifest.read_files(indexed_version.path)
    assert set(files) == {*CORPUS_FILES, PASSAGES_FILE, SPANS_FILE, "ivf.safetensors", "README.md"}
    assert all(files[name] == (larger_dir / name).read_bytes() for name in CORPUS_FILES)
    assert np.array_equal(read_corpus(indexed_version.path).vectors, read_corpus(larger_dir).vectors)


@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_ids_and_metadata_are_served_with_either_index(
    registry: Registry, larger_dir: Path, tmp_path: Path, card: Callable[..., Card], index: Literal["flat", "ivf"]
) -> None:
    data = Path(shutil.copytree(larger_dir, tmp_path / "data"))
    fields = Fields(Texts.of(f"id-{row}" for row in range(1200)), {"even": Column.of([True, False] * 600)})
    (data / FIELDS_FILE).write_bytes(fields.to_bytes())
    corpus = load_retriever(publish_corpus(registry, data, card(kind="corpus"), index).path).corpus
    assert corpus.chunk(77).fields() == {"source_id": "id-77", "metadata": {"even": False}}
    assert corpus.matching({"even": [True]}).sum() == 600


def test_a_small_corpus_gets_no_index_unless_asked(indexed_version: Version, corpus_version: Version) -> None:
    assert not (corpus_version.path / "ivf.safetensors").exists()
    assert (indexed_version.path / "ivf.safetensors").exists()


def test_a_large_corpus_gets_an_index_unless_flat(
    registry: Registry, tmp_path: Path, card: Callable[..., Card]
) -> None:
    rows = FLAT_ROWS + 1
    lines = [{"article_id": 0, "title": "", "chunks": [""] * rows}]
    vectors = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    write_corpus(tmp_path / "data", normalise(vectors), lines)
    made = {
        index: publish_corpus(registry, tmp_path / "data", card(kind="corpus"), index) for index in ("auto", "flat")
    }
    assert (made["auto"].path / "ivf.safetensors").exists()
    assert not (made["flat"].path / "ivf.safetensors").exists()


def test_an_index_that_cannot_be_made_leaves_nothing_behind(
    registry: Registry, larger_dir: Path, tmp_path: Path, card: Callable[..., Card]
) -> None:
    shutil.copytree(larger_dir, tmp_path / "data")
    (tmp_path / "data" / VECTORS_FILE).write_bytes(b"none")
    with pytest.raises(BadCorpus, match="unreadable corpus"):
        publish_corpus(registry, tmp_path / "data", card(kind="corpus"), "ivf")
    assert list(registry.root.iterdir()) == []
