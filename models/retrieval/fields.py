"""Ids and metadata of the chunks of a corpus, as the caller who made it names them.

Format of `fields.safetensors`, for N chunks. `source_id.text` uint8 and `source_id.offsets` int64 `(N + 1,)`: the ids
in UTF-8, one after another, and where each begins and ends; an empty id stands for none. For each metadata field NAME
with V distinct values: `metadata.NAME.codes` int32 `(N,)`, the number of each chunk's value, -1 for none;
`metadata.NAME.text` and `metadata.NAME.offsets` `(V + 1,)`: the values as JSON, in ascending order of their bytes.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from models.registry.manifest import Buffer
from models.retrieval.tensors import BadTensors, view_tensors

FIELDS_FILE = "fields.safetensors"
# What a filter calls the article of a chunk; no metadata field has this name.
ARTICLE = "article"
# A value of a metadata field.
Value = str | int | float | bool
Filter = Mapping[str, Sequence[Value]]
Mask = NDArray[np.bool_]
# Up to here a floating-point number is an exact integer.
_EXACT = 2**53


class BadFields(ValueError):
    """Ids or metadata are damaged, or do not have one entry per chunk."""


class UnknownField(ValueError):
    """A filter names a field that the corpus does not have."""


@dataclass(frozen=True)
class Texts:
    """N texts: their UTF-8 bytes `text` `(M,)`, and `offsets` `(N + 1,)` at which they begin and end."""

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Return `texts` in this form; raises `BadFields` for a lone surrogate, which UTF-8 does not have."""
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise BadFields(f"{error.object[:100]!r} is not valid Unicode") from error
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @classmethod
    def checked(cls, text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Texts:
        """Return texts that are read from a file; raises `BadFields` if they are damaged."""
        types = [text.dtype.name, offsets.dtype.name]
        if types != ["uint8", "int64"] or (text.ndim, offsets.ndim) != (1, 1) or not len(offsets):
            raise BadFields("texts must be uint8 (M,) with offsets int64 (N + 1,)")
        if offsets[0] or offsets[-1] != len(text) or (np.diff(offsets) < 0).any():
            raise BadFields("offsets must ascend from 0 to the length of the text")
        starts = offsets[offsets < len(text)]
        try:
            text.tobytes().decode()
        except UnicodeDecodeError as error:
            raise BadFields(f"text is not UTF-8: {error}") from error
        if ((text[starts] & 0xC0) == 0x80).any():
            raise BadFields("an offset is inside a character")
        return cls(text, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, row: int) -> str:
        begin, end = self.offsets[row : row + 2].tolist()
        if begin == end:
            return ""
        return self.text[begin:end].tobytes().decode()


@dataclass(frozen=True)
class Column:
    """One metadata field: `codes` `(N,)`, the number of each chunk's value, -1 for none; `values`, as JSON texts."""

    codes: NDArray[np.int32]
    values: Texts

    @classmethod
    def of(cls, values: Sequence[Value | None]) -> Column:
        """Return the column of a value, or None, for each chunk; raises `BadFields` for a value of another type."""
        texts = [None if value is None else as_text(value) for value in values]
        distinct = sorted({text for text in texts if text is not None})
        number = {text: code for code, text in enumerate(distinct)}
        codes = np.fromiter((-1 if text is None else number[text] for text in texts), np.int32, len(texts))
        return cls(codes, Texts.of(distinct))

    def __getitem__(self, row: int) -> Value | None:
        code = int(self.codes[row])
        return None if code < 0 else _value(self.values[code])

    def matching(self, wanted: Sequence[Value]) -> Mask:
        """Return which chunks `(N,)` have one of the values."""
        codes = [code for code in map(self._code, wanted) if code >= 0]
        return np.isin(self.codes, np.array(codes, np.int32))

    def _code(self, value: Value) -> int:
        text = as_text(value)
        code = bisect.bisect_left(self.values, text)
        return code if code < len(self.values) and self.values[code] == text else -1


@dataclass(frozen=True)
class Fields:
    """Source ids, if the corpus has them, and metadata fields by name; each has one entry per chunk."""

    ids: Texts | None = None
    metadata: Mapping[str, Column] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the corpus has neither ids nor metadata."""
        return self.ids is None and not self.metadata

    def source_id(self, row: int) -> str | None:
        """Return the id of a chunk in the data set that the customer provided."""
        return self.ids[row] or None if self.ids is not None else None

    def metadata_of(self, row: int) -> dict[str, Value] | None:
        """Return the metadata of a chunk, without fields that it does not have; None if the corpus has no field."""
        if not self.metadata:
            return None
        found = ((name, column[row]) for name, column in self.metadata.items())
        return {name: value for name, value in found if value is not None}

    def to_bytes(self) -> bytes:
        """Return the fields as a safetensors file."""
        tensors = _parts("source_id", self.ids) if self.ids is not None else {}
        for name, column in self.metadata.items():
            tensors |= {f"metadata.{name}.codes": column.codes, **_parts(f"metadata.{name}", column.values)}
        return bytes(save_tensors(tensors))

    @classmethod
    def from_bytes(cls, data: Buffer, count: int) -> Fields:
        """Read the fields of `count` chunks, as views of a safetensors file.

        Raises:
            BadFields: the file is damaged, or has another number of chunks.
        """
        try:
            tensors = view_tensors(data)
        except BadTensors as error:
            raise BadFields(f"{FIELDS_FILE}: {error}") from error
        try:
            return _read(tensors, count)
        except KeyError as error:
            raise BadFields(f"{FIELDS_FILE}: lacks {error}") from error
        except BadFields as error:
            raise BadFields(f"{FIELDS_FILE}: {error}") from error


def matching(article: NDArray[np.int32], fields: Fields, wanted: Filter) -> Mask:
    """Return which chunks `(N,)` a filter keeps: for each name in it, the chunk has one of the values.

    Raises:
        UnknownField: the filter names a field that is neither `article` nor in the metadata.
    """
    mask = np.ones(len(article), np.bool_)
    for name, values in wanted.items():
        if name == ARTICLE:
            mask &= np.isin(article, [value for value in values if _is_article(value)])
        elif name in fields.metadata:
            mask &= fields.metadata[name].matching(values)
        else:
            known = ", ".join([ARTICLE, *fields.metadata])
            raise UnknownField(f"the corpus has no field {name!r}; it has {known}")
    return mask


def as_text(value: Value) -> str:
    """Return a value as JSON, a whole number without a fraction; raises `BadFields` for a value of another type."""
    if not isinstance(value, str | bool | int | float):
        raise BadFields(f"{type(value).__name__} is no value of a field; expected a string, a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadFields(f"{value} is no value of a field; expected a finite number")
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise BadFields("a whole number of more than 64 bits is no value of a field")
    return json.dumps(value, ensure_ascii=False)


def _is_article(value: Value) -> bool:
    """Return whether a value can be the number of an article: an int32 that is not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _value(text: str) -> Value:
    value: Value = json.loads(text)
    return value


def _parts(name: str, texts: Texts) -> dict[str, NDArray[Any]]:
    return {f"{name}.text": texts.text, f"{name}.offsets": texts.offsets}


def _read(tensors: Mapping[str, NDArray[Any]], count: int) -> Fields:
    ids = _texts(tensors, "source_id") if "source_id.offsets" in tensors else None
    if ids is not None and len(ids) != count:
        raise BadFields(f"has ids of {len(ids)} chunks; the corpus has {count}")
    names = [name[len("metadata.") : -len(".codes")] for name in tensors if name.endswith(".codes")]
    return Fields(ids, {name: _column(tensors, name, count) for name in sorted(names)})


def _texts(tensors: Mapping[str, NDArray[Any]], name: str) -> Texts:
    return Texts.checked(tensors[f"{name}.text"], tensors[f"{name}.offsets"])


def _column(tensors: Mapping[str, NDArray[Any]], name: str, count: int) -> Column:
    codes, values = tensors[f"metadata.{name}.codes"], _texts(tensors, f"metadata.{name}")
    if codes.dtype.name != "int32" or codes.shape != (count,):
        raise BadFields(f"field {name!r} has codes {codes.dtype} {codes.shape}; expected int32 ({count},)")
    if count and not -1 <= codes.min() <= codes.max() < len(values):
        raise BadFields(f"field {name!r} has a code outside of its {len(values)} values")
    texts = list(values)
    if any(as_text(_parsed(name, text)) != text for text in texts) or texts != sorted(set(texts)):
        raise BadFields(f"field {name!r}: values must be distinct JSON in ascending order")
    return Column(codes, values)


def _parsed(name: str, text: str) -> Value:
    try:
        return _value(text)
    except (ValueError, RecursionError) as error:
        raise BadFields(f"field {name!r}: {text[:100]!r} is not JSON") from error
