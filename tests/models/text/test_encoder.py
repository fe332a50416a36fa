"""The encoder without torch makes the vectors of the shipped corpus; unavailable encoders name what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.retrieval.corpus import Corpus, read_corpus
from models.text import encoder
from models.text.encoder import EncoderError, MiniLM, is_same_model, open_encoder
from models.training.bert import graph_of

SHIPPED = Path(__file__).parents[3] / "artifacts" / "lvm" / "retriever"
SAMPLE = 12


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM(threads=2)


@pytest.fixture(scope="module")
def shipped() -> Corpus:
    return read_corpus(SHIPPED.resolve())


def test_chunks_of_the_shipped_corpus_encode_to_its_vectors(minilm: MiniLM, shipped: Corpus) -> None:
    rows = np.linspace(0, len(shipped) - 1, SAMPLE).astype(int)
    vectors = minilm.encode([str(shipped.chunk(row).text) for row in rows])
    assert vectors.dtype == np.float32
    assert (vectors * shipped.vectors[rows]).sum(axis=1).min() >= 0.9999


def test_word_pieces_are_counted_as_the_shipped_corpus_counts_them(minilm: MiniLM, shipped: Corpus) -> None:
    article = next(iter(shipped.articles.values()))
    assert [minilm.count_tokens(text) for text in article["chunks"]] == article["ntok"]


def test_reads_up_to_the_limit_and_counts_beyond(minilm: MiniLM) -> None:
    seen: list[tuple[int, int]] = []
    vectors = minilm.encode(["short", "word " * 300, "word " * 254], lambda done, total: seen.append((done, total)))
    assert vectors.shape == (3, minilm.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[1], vectors[2])
    assert minilm.count_tokens("word " * 300) == 300
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert minilm.encode([]).shape == (0, minilm.dim)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A" * 101, "B" * 101),
        ("https://example.org/" + "a1" * 60, "https://example.org/" + "zz" * 70),
        ("x" * 400, "y" * 400),
    ],
)
def test_words_beyond_the_longest_of_the_tokeniser_are_read(minilm: MiniLM, one: str, other: str) -> None:
    first, second = minilm.encode([one, other])
    assert first @ second < 0.95
    assert minilm.text_info(one).unread == 0


@pytest.mark.parametrize(
    "text",
    [
        *("", "\u200b\u200d", "\ufeff", "\u0301", "\u202e\u200f", "\0", "\ue000", "\U000e0041"),  # nothing is seen
        *("🐇", "🐇🐇🐇", "ᚠᚢᚦ", "ດ" * 150, "កខគ", "ნაცნობი", "ㅤ", "⠀"),  # nothing is known
        *("กระต่าย!!!", "รถไฟใต้ดิน... 1", "(🐇) ‽"),  # as good as nothing is
    ],
)
def test_a_mostly_unknown_text_has_a_fault(minilm: MiniLM, text: str) -> None:
    assert minilm.text_info(text).fault


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("Do hares dig burrows?", 0),
        ("?!", 0),
        ("Café à Zürich", 0),
        ("Кролики живут в норах", 0),
        ("rab\u200bbit\u0301 \0hole", 0),
        ("rabbits 🐇🐇🐇", 0.3),
        ("cute🐇 rabbits", 5 / 12),
        ("兔子住在地下洞穴里", 5 / 9),
    ],
)
def test_reports_the_share_of_unknown_words(minilm: MiniLM, text: str, unread: float) -> None:
    info = minilm.text_info(text)
    assert info.unread == pytest.approx(unread)
    assert info.fault is None


def test_reports_how_much_of_a_text_is_read(minilm: MiniLM) -> None:
    assert minilm.text_info("word " * 254) == (254, 254, 0)
    assert minilm.text_info("word " * 300 + "🐇") == (301, 254, 0)
    assert not minilm.text_info("word " * 254).truncated
    assert minilm.text_info("word " * 255).truncated
    assert minilm.text_info("🐇 " * 254 + "word " * 300).fault  # what is read counts


def test_the_shipped_graph_is_what_the_code_makes(minilm: MiniLM) -> None:
    sizes = json.loads((minilm.directory / "config.json").read_text())
    weights = (minilm.directory / encoder.WEIGHTS).read_bytes()
    assert graph_of(sizes, weights) == encoder.GRAPH.read_bytes()


def test_rejects_unknown_weights(tmp_path: Path) -> None:
    altered = MiniLM(threads=1)
    altered.directory = tmp_path
    with pytest.raises(EncoderError, match="No such file"):
        altered.encode(["text"])
    (tmp_path / encoder.WEIGHTS).write_bytes(b"altered")
    with pytest.raises(EncoderError, match="unexpected checksum"):
        altered.encode(["text"])


def test_identifies_a_model_by_the_last_part_of_its_name() -> None:
    assert is_same_model("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2")
    assert is_same_model("/models/gtr-t5-base/", "sentence-transformers/gtr-t5-base")
    assert not is_same_model("all-MiniLM-L12-v2", "all-MiniLM-L6-v2")
    assert isinstance(open_encoder("sentence-transformers/all-MiniLM-L6-v2", 1), MiniLM)
    with pytest.raises(EncoderError, match="without an encoder"):
        open_encoder("none", 1)


WITHOUT_THE_EXTRAS = """
import sys
from models.text.encoder import EncoderError, MiniLM, SentenceTransformersEncoder
assert not {"torch", "sentence_transformers", "tokenizers", "onnxruntime"} & set(sys.modules), "imported with it"
sys.modules.update(sentence_transformers=None, tokenizers=None)  # as if they were not installed
for make in (lambda: SentenceTransformersEncoder("all-MiniLM-L6-v2"), lambda: MiniLM(1)):
    try:
        make()
    except EncoderError as error:
        print(error)
"""


def test_imports_without_extras_and_names_what_is_missing() -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", WITHOUT_THE_EXTRAS]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "'lvm-serve[data]'" in ran.stdout
    assert "`make text`" in ran.stdout
