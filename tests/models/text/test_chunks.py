"""Text is cut as a reader would cut it; no word is lost, moved or invented."""

import hashlib
import random
import time
from pathlib import Path

import pytest

from models.retrieval.corpus import read_corpus
from models.text.chunks import Sizes, chunk, sentences
from tests.fakes import prose, words

SHIPPED = Path(__file__).parents[3] / "artifacts" / "lvm" / "retriever"
CUT_BEFORE = "d102b13b910e17dac4cde9b64960e80538f0e831f7b1efd62ca85789d49abe7a"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One thing. Another thing! A third? Yes.", 4),
        ("Dr. Smith met J. R. Jones of the U.S. Navy on Jan. 5 at 3.14 p.m. and left.", 1),
        ("See e.g. the notes, i.e. the end.", 1),
        ('He said "Stop." Then he left.', 2),
        ("Wait... what? Fine.", 2),
        ("No stop at the end", 1),
        ("Ein Satz. Über uns. Éire.", 3),
        ("  \n ", 0),
        ("兔子住在洞里。它们吃草！真的吗？是的", 4),
        ("他说:「它们吃草。」然后走了。", 2),
        ("ウサギは草を食べる．体温は３．５度．", 2),
        ("खरगोश घास खाते हैं। वे बिल में रहते हैं॥ हाँ", 3),
        ("هل تأكل الأرانب العشب؟ نعم. خرگوش گھاس کھاتا ہے۔ہاں", 4),
        ("ጥንቸል ሣር ይበላል።አዎ", 2),
        ("ទន្សាយស៊ីស្មៅ។បាទ", 2),
        ("Նապաստակը խոտ է ուտում։ Այո։", 2),
        ("The title 兔子。 means rabbit.", 1),
    ],
)
def test_splits_sentences_as_a_reader_would(text: str, count: int) -> None:
    assert len(sentences(text)) == count
    assert "".join(sentences(text)).split() == text.split()


def test_a_line_of_dots_takes_linear_time() -> None:
    started = time.process_time()
    sentences("." * 200_000 + "x")
    assert time.process_time() - started < 2


def pieces_of(text: str) -> int:
    """Count word-pieces of scripts without spaces: each character is one, a space is none."""
    return len("".join(text.split()))


def test_splits_scripts_without_spaces() -> None:
    text = "兔子是一种小型哺乳动物,生活在地下洞穴中。它们以草为食,一年四季都在繁殖。野兔则独自生活,不挖洞穴。" * 20
    pieces = chunk(text, pieces_of)
    assert "".join(pieces) == text
    assert all(piece.endswith("。") for piece in pieces)
    assert all(30 <= pieces_of(piece) <= 140 for piece in pieces)


@pytest.mark.parametrize("character", ["👩\u200d👩\u200d👧", "👍🏽", "e\u0301\u0323", "कि"])
def test_never_cuts_a_character(character: str) -> None:
    text = "(" + character * 307
    pieces = chunk(text, pieces_of)
    assert len(pieces) > 1
    assert "".join(pieces) == text
    assert all(len(piece.lstrip("(")) % len(character) == 0 for piece in pieces)


def test_cuts_a_word_of_combining_characters() -> None:
    assert "".join(chunk("\u0301" * 5000, pieces_of)) == "\u0301" * 5000


def test_counts_any_text_only_a_few_times() -> None:
    for text in ("… " * 5000, "x" * 5000, "word " * 5000, "One. " * 5000):
        counted = 0

        def count(part: str) -> int:
            nonlocal counted
            counted += len(part)
            return words(part) + len(part) // 100

        chunk(text, count)
        assert counted < 8 * len(text)


def test_english_is_cut_as_when_the_corpora_that_ship_were_made() -> None:
    articles = read_corpus(SHIPPED.resolve()).articles.values()
    made = [piece for article in articles for piece in chunk("\n\n".join(article["chunks"]), words)]
    assert hashlib.sha256("\0".join(made).encode()).hexdigest() == CUT_BEFORE


def sizes_of(text: str) -> list[int]:
    return [words(piece) for piece in chunk(text, words)]


@pytest.mark.parametrize(
    ("sentence_sizes", "expected"),
    [
        ([40, 40, 40, 40], [80, 80]),
        ([50, 50, 50], [100, 50]),
        ([20, 110, 40], [130, 40]),  # below the least, it takes one more sentence beyond the full size
        ([120, 60], [120, 60]),
        ([90, 20], [110]),  # a short tail joins the chunk before it
        ([120, 25], [120]),  # and is dropped where there is no room
        ([20, 130], [85, 65]),  # 150 is too much: the sentence is halved
        ([300], [75, 75, 75, 75]),
        ([29], []),
        ([30], [30]),
        ([], []),
    ],
)
def test_sentences_are_packed_up_to_the_full_size(sentence_sizes: list[int], expected: list[int]) -> None:
    assert sizes_of(prose(sentence_sizes)) == expected


@pytest.mark.parametrize(("paragraphs", "expected"), [([50, 40], [50, 40]), ([49, 40], [89]), ([20, 20], [40])])
def test_a_paragraph_ends_a_chunk_of_fifty_or_more(paragraphs: list[int], expected: list[int]) -> None:
    assert sizes_of("\n \n".join(prose([size]) for size in paragraphs)) == expected


def test_a_single_word_beyond_the_most_is_split_between_characters() -> None:
    pieces = chunk("x" * 500, len)
    assert "".join(pieces) == "x" * 500
    assert all(30 <= len(piece) <= 140 for piece in pieces)


@pytest.mark.parametrize("seed", range(40))
def test_chunks_hold_the_words_in_order_within_the_limits(seed: int) -> None:
    draw = random.Random(seed)
    limits = Sizes() if seed % 2 else Sizes(least=5, close=8, full=12, most=20)
    paragraphs = [
        prose([draw.choice([1, 3, 12, 25, 60, 99, 141, 400]) for _ in range(draw.randint(0, 6))], 10_000 * i)
        for i in range(draw.randint(1, 12))
    ]
    text = "\n\n".join(paragraphs)
    pieces = chunk(text, words, limits)
    kept = " ".join(pieces).split()
    assert kept == text.split()[: len(kept)]
    assert words(text) - len(kept) < limits.least
    assert all(limits.least <= words(piece) <= limits.most for piece in pieces)
