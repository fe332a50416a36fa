"""Vectors that are already computed become a corpus as they are; what cannot be one is refused with its rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.retrieval.corpus import Corpus, read_corpus, stated_encoder
from models.training import vector_files
from models.training.array_files import BadArrays
from models.training.vector_files import VectorSummary
from models.training.work_cache import cache_next_to
from models.vectors import normalise

N, D = 12, 8
VECTORS = normalise(np.random.default_rng(0).standard_normal((N, D)))
# Two articles of six chunks.
THEIRS: dict[str, Any] = {
    "vectors": VECTORS,
    "concept_texts": np.array([f"text {row}" for row in range(N)]),
    "cpe_ids": np.array([f"cpe-{row}" for row in range(N)]),
    "article_indices": np.repeat([1061, 7], 6),
    "chunk_indices": np.tile(np.arange(6), 2),
    "article_titles": np.repeat(["One", "Two"], 6),
    "lang": np.repeat(["en", "de"], 6),
    "score": np.where(np.arange(N) == 3, np.nan, np.arange(N) / 2),
}


def made(
    directory: Path, arrays: dict[str, Any], metadata: tuple[str, ...] = (), skip_bad: bool = False, **fields: str
) -> tuple[Corpus, VectorSummary]:
    np.savez(directory / "x.npz", **arrays)
    out = directory / "out"
    summary = vector_files.build(
        directory / "x.npz", out, "gtr", fields, metadata, skip_bad, lambda done, total: None, cache_next_to(out)
    )
    assert {path.name for path in directory.iterdir()} == {"x.npz", "out"}, "nothing else is left"
    return read_corpus(out), summary


def refused(directory: Path, arrays: dict[str, Any], **fields: str) -> str:
    with pytest.raises(BadArrays) as found:
        made(directory, arrays, **fields)
    assert {path.name for path in directory.iterdir()} == {"x.npz"}, "nothing is half-written"
    return str(found.value)


def test_keeps_vectors_texts_ids_and_metadata(tmp_path: Path) -> None:
    corpus, summary = made(tmp_path, THEIRS, ("lang", "score"))
    assert np.abs(corpus.vectors - VECTORS).max() < 1e-3
    assert (corpus.article.tolist(), corpus.position.tolist()) == ([1061] * 6 + [7] * 6, [*range(6), *range(6)])
    assert corpus.chunk(7) == (7, "Two", 1, "text 7", "cpe-7", {"lang": "de", "score": 3.5})
    assert corpus.chunk(3).metadata == {"lang": "en"}
    assert (summary.articles, summary.chunks, summary.windows, summary.dim) == (2, 12, 2, 8)
    assert (summary.encoder, stated_encoder(tmp_path / "out")) == ("gtr", "gtr")
    assert vector_files.warnings(summary) == []


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_vectors_of_any_length_and_type_are_normalised_and_counted(tmp_path: Path, kind: Any) -> None:
    scale = np.where(np.arange(N) % 2, 1, 30)[:, None]
    corpus, summary = made(tmp_path, {"vectors": (VECTORS * scale).astype(kind)})
    assert np.abs(corpus.vectors - VECTORS).max() < 3e-3
    assert summary.normalised == 6
    assert "6 of 12 vectors did not have unit length; they were normalised" in vector_files.warnings(summary)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_lengths_keep_their_direction(tmp_path: Path, scale: float) -> None:
    corpus, _ = made(tmp_path, {"vectors": VECTORS.astype(np.float64) * scale})
    assert np.abs(corpus.vectors - VECTORS).max() < 1e-3


def test_articles_are_put_in_reading_order(tmp_path: Path) -> None:
    shuffled = np.random.default_rng(1).permutation(N)
    corpus, summary = made(tmp_path, {name: array[shuffled] for name, array in THEIRS.items()}, ("lang",))
    assert corpus.position.tolist() == [*range(6), *range(6)]
    for row in range(N):
        chunk = corpus.chunk(row)
        right = next(at for at in range(N) if f"cpe-{at}" == chunk.source_id)
        assert np.abs(corpus.vectors[row] - VECTORS[right]).max() < 1e-3
        assert (chunk.text, chunk.article) == (f"text {right}", THEIRS["article_indices"][right])
        assert chunk.metadata == {"lang": THEIRS["lang"][right]}
    assert summary.moved > 0


def test_older_files_without_articles_are_one_article(tmp_path: Path) -> None:
    corpus, summary = made(tmp_path, {name: THEIRS[name] for name in ("vectors", "concept_texts", "cpe_ids")})
    assert (corpus.article.tolist(), corpus.position.tolist()) == ([0] * N, list(range(N)))
    assert any("windows may cross" in warning for warning in vector_files.warnings(summary))


def test_positions_are_counted_if_the_file_has_none_and_may_have_gaps(tmp_path: Path) -> None:
    interleaved = {"vectors": VECTORS, "doc_id": np.tile(["a", "b"], 6)}
    corpus, _ = made(tmp_path, interleaved)
    assert (corpus.article.tolist(), corpus.position.tolist()) == ([0] * 6 + [1] * 6, [*range(6), *range(6)])
    assert [corpus.chunk(row).title for row in (0, 6)] == ["a", "b"]


def test_a_gap_keeps_positions_and_texts_apart(tmp_path: Path) -> None:
    corpus, summary = made(tmp_path, {**THEIRS, "chunk_indices": np.tile([0, 1, 2, 3, 4, 9], 2)})
    assert corpus.position.tolist()[:6] == [0, 1, 2, 3, 4, 9]
    assert [corpus.chunk(row).text for row in (4, 5)] == ["text 4", "text 5"]
    assert summary.windows == 0
    assert any("no article has six chunks" in warning for warning in vector_files.warnings(summary))


def test_other_names_are_given_and_a_recognised_one_is_declined(tmp_path: Path) -> None:
    np.save(tmp_path.parent / "texts.npy", THEIRS["concept_texts"])
    other = {"emb": VECTORS, "key": THEIRS["cpe_ids"], "article_indices": np.zeros(N, int), "junk": np.zeros((N, 2))}
    fields = {"vectors": "emb", "ids": "key", "articles": "", "texts": str(tmp_path.parent / "texts.npy")}
    corpus, summary = made(tmp_path, other, **fields)
    assert corpus.chunk(2)[3:5] == ("text 2", "cpe-2")
    assert summary.unused == ["article_indices", "junk"]


def test_a_npy_file_has_the_vectors_and_others_the_rest(tmp_path: Path) -> None:
    np.save(tmp_path / "bank.npy", VECTORS)
    np.save(tmp_path / "doc.npy", THEIRS["article_indices"])
    out, fields = tmp_path / "out", {"articles": str(tmp_path / "doc.npy")}
    summary = vector_files.build(
        tmp_path / "bank.npy", out, "", fields, (), False, lambda done, total: None, cache_next_to(out)
    )
    assert (summary.articles, summary.unused, vector_files.warnings(summary)) == (2, [], [])
    assert read_corpus(out).chunk(6) == (7, "", 0, None, None, None)
    assert stated_encoder(out) is None


def test_rows_without_a_direction_are_refused_or_left_out(tmp_path: Path) -> None:
    vectors = VECTORS.copy()
    vectors[1], vectors[5, 2], vectors[8, 0] = 0, np.nan, np.inf
    message = refused(tmp_path, {**THEIRS, "vectors": vectors})
    assert "x.npz: `vectors`: 3 vectors are zero or not finite (rows 1, 5, 8); --skip-bad leaves them out" in message
    corpus, summary = made(tmp_path, {**THEIRS, "vectors": vectors}, ("lang",), skip_bad=True)
    assert [corpus.chunk(row).source_id for row in range(9)] == [f"cpe-{row}" for row in (0, 2, 3, 4, 6, 7, 9, 10, 11)]
    assert corpus.chunk(1)[2:4] == (2, "text 2")
    assert "3 vectors were left out: they are zero or not finite" in vector_files.warnings(summary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": np.ones((N, 5, D))}, r"`vectors` is float64 \(12, 5, 8\).*pairs .*lvm evaluate"),
        ({"vectors": np.ones((N, D), int)}, "expected floating-point vectors"),
        ({"vectors": np.ones((0, D))}, "expected floating-point vectors"),
        ({"vectors": np.zeros((N, D))}, "12 vectors are zero"),
        ({"cpe_ids": np.arange(N - 1)}, "`cpe_ids` has 11 ids; there are 12 vectors; --field ids= does without"),
        ({"chunk_indices": np.zeros(N, int)}, "10 rows have the article and the position of another: rows 0 and 1, "),
        ({"chunk_indices": np.arange(N) - 1}, "row 0 is -1; expected a whole number from 0"),
        ({"chunk_indices": np.arange(N) * 0.5}, "row 1 is 0.5; expected a whole number"),
        ({"chunk_indices": np.arange(N) * 1_000_000}, "reaches 11000000"),
        ({"article_indices": np.full(N, np.nan)}, "row 0 is not a number"),
        ({"concept_texts": np.arange(N)}, "`concept_texts` is int64 .*expected one text"),
        ({"concept_texts": np.array([{}] * N)}, "`concept_texts` holds pickled Python objects"),
        ({"concept_texts": np.array(["\ud800"] * N)}, "not valid Unicode"),
    ],
)
def test_refuses_what_is_no_corpus(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArrays, match=message):
        made(tmp_path, {**THEIRS, **change})
    assert not (tmp_path / "out").exists()


def test_refuses_fields_that_do_not_exist(tmp_path: Path) -> None:
    assert "no array 'source'; it has vectors" in refused(tmp_path, THEIRS, ids="source")
    assert "no array is called `vectors`; it has x: --field vectors=NAME" in refused(tmp_path, {"x": VECTORS})
    with pytest.raises(BadArrays, match="no array 'year'"):
        made(tmp_path, THEIRS, ("year",))
    with pytest.raises(BadArrays, match="`score`: inf is no value"):
        made(tmp_path, {**THEIRS, "score": np.full(N, np.inf)}, ("score",))
