"""Raw little-endian numbers, and the parameters of their media type."""

from __future__ import annotations

import base64
import binascii
import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lvm.errors import Invalid, Malformed, TooLarge, UnsupportedMediaType
from models.vectors import Floats
from service.http.headers import MediaType, media_type

OCTETS = b"application/octet-stream"
FLOAT32, FLOAT16 = np.dtype("<f4"), np.dtype("<f2")
DTYPES: dict[bytes, np.dtype[Any]] = {b"float32": FLOAT32, b"float16": FLOAT16}
LARGEST = 1e9  # vectors have unit length; the square of a larger number may overflow float32
FEW = 10_000  # numbers that BLAS multiplies in one thread
Shape = tuple[int, ...]


class OctetType(NamedTuple):
    """The type of number of octets, and their shape if their media type has one."""

    dtype: np.dtype[Any] = FLOAT32
    shape: Shape | None = None


@lru_cache(maxsize=256)
def octet_type(header: bytes) -> OctetType:
    """Return the type of number, and the shape, in a header `application/octet-stream`.

    `dtype=float16` halves the bytes; without a dtype they are float32. `shape=2x5x384`, or `shape="2,5,384"`, is
    their shape. Other parameters are ignored.

    Raises:
        UnsupportedMediaType: another dtype.
        Invalid: a shape that is malformed, or given more than once.
    """
    named = media_type(header) or MediaType(OCTETS, ())
    dtype, shapes = dtype_of(named), named.values(b"shape")
    if len(shapes) > 1:
        raise Invalid("the Content-Type has more than one shape; expected one")
    return OctetType(dtype, _shape(shapes[0]) if shapes else None)


def dtype_of(named: MediaType) -> np.dtype[Any]:
    """Return the type of the numbers in octets; raises `UnsupportedMediaType` as `octet_type`."""
    dtypes = [value.lower() for value in named.values(b"dtype")]
    if len(dtypes) > 1 or (dtypes and dtypes[0] not in DTYPES):
        raise UnsupportedMediaType("unsupported dtype of application/octet-stream; expected float32 or float16")
    return DTYPES[dtypes[0]] if dtypes else FLOAT32


@lru_cache(maxsize=256)
def octets_of(dtype: np.dtype[Any], shape: Shape) -> bytes:
    """Return the media type of octets of that dtype and shape."""
    return b"%b; dtype=%b; shape=%b" % (OCTETS, dtype.name.encode(), spelled(shape).encode())


def spelled(shape: Shape) -> str:
    """Return a shape as a media type carries it: `2x5x384`."""
    return "x".join(map(str, shape))


def _shape(value: bytes) -> Shape:
    sizes = [size.strip() for size in re.split(b"[xX,]", value)]
    if not all(size.isdigit() and len(size) < 10 and int(size) for size in sizes):
        raise Invalid("malformed shape in the Content-Type; expected positive sizes, for example shape=2x5x384")
    return tuple(map(int, sizes))


def read_octets(body: bytes, kind: OctetType, item: Shape, max_rows: int, *, many: bool) -> Floats:
    """Read the rows `(n, *item)` of a body of the given `kind`; more than one only if `many`.

    Raises:
        Invalid: the shape is not the net's, or not that of the bytes; or there are several rows without a shape.
        Malformed, TooLarge: as `decode_octets`.
    """
    if kind.shape is not None:
        _check_shape(kind.shape, item, many)
        _check_size(len(body), kind.dtype, kind.shape)
    elif len(body) > kind.dtype.itemsize * math.prod(item):
        _reject_rows(len(body), kind.dtype, item, max_rows if many else None)
    return decode_octets(body, item, max_rows, kind.dtype)


def _reject_rows(length: int, dtype: np.dtype[Any], item: Shape, most: int | None) -> None:
    """Raise `Invalid` if bytes without a shape are several rows, which could be divided in another way.

    Up to `most` rows may be sent with a shape; None means one row only.
    """
    size = dtype.itemsize * math.prod(item)
    if length % size or (most is not None and length > most * size):
        return
    example = octets_of(dtype, (length // size, *item)).decode()
    hint = f", or their shape in the Content-Type: {example}" if most is not None else ""
    raise Invalid(f"body is {length} bytes without a shape; expected {size} ({dtype.name}, shape {item}){hint}")


def _check_shape(shape: Shape, item: Shape, many: bool) -> None:
    if shape == item or (many and shape[1:] == item):
        return
    more = f" or (n, {', '.join(map(str, item))})" if many else ""
    raise Invalid(f"octets of shape {shape}; expected {item}{more}")


def _check_size(length: int, dtype: np.dtype[Any], shape: Shape) -> None:
    size = dtype.itemsize * math.prod(shape)
    if length != size:
        raise Invalid(f"body is {length} bytes; expected {size} ({dtype.name}, shape {shape})")


def decode_octets(body: bytes, shape: Shape, max_rows: int, dtype: np.dtype[Any] = FLOAT32) -> Floats:
    """Read raw little-endian rows `(n, *shape)`; float32 without copying them.

    Raises:
        Malformed: the length is not a whole, positive number of rows.
        Invalid: a value is not finite, with the pointer it would have in JSON.
        TooLarge: more than `max_rows` rows.
    """
    size = dtype.itemsize * math.prod(shape)
    if not body or len(body) % size:
        raise Malformed(f"body is {len(body)} bytes; expected a multiple of {size} ({dtype.name}, shape {shape})")
    if len(body) > max_rows * size:
        raise TooLarge(f"{len(body) // size} rows; expected at most {max_rows}")
    rows: Floats = np.frombuffer(body, dtype).reshape(len(body) // size, *shape)
    if dtype is not FLOAT32:
        rows = rows.astype(np.float32, copy=False)
    reject_non_finite(rows, "")
    return rows


def encode_octets(vectors: Floats, dtype: np.dtype[Any] = FLOAT32) -> bytes:
    """Return raw little-endian numbers."""
    return np.ascontiguousarray(vectors, dtype).tobytes()


def encode_base64(vector: Floats) -> str:
    """Return little-endian float32 as base64."""
    return base64.b64encode(encode_octets(vector)).decode()


def from_base64(value: str, pointer: str, shape: Shape) -> Floats:
    """Return the float32 numbers `shape` of their base64; raises `Invalid`."""
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid(
            "expected numbers, or the base64 of their float32 bytes; for text use the field `text` or `texts`",
            pointer=pointer,
        ) from error
    if len(data) != 4 * math.prod(shape):
        raise Invalid(
            f"base64 of {len(data)} bytes; expected {4 * math.prod(shape)} (float32, shape {shape})", pointer=pointer
        )
    array = np.frombuffer(data, FLOAT32).reshape(shape)
    reject_non_finite(array, pointer)
    return array


def reject_non_finite(array: Floats, pointer: str) -> None:
    """Raise `Invalid`, with the pointer of the number, if one is not finite or larger than `LARGEST`."""
    if not is_in_range(array):
        place = np.unravel_index(int(np.argmin(np.abs(array) <= LARGEST)), array.shape)
        pointer += "".join(f"/{at}" for at in place)
        raise Invalid(f"expected a finite float32, at most {LARGEST:.0e} in size", pointer=pointer)


def is_in_range(array: Floats) -> bool:
    """Return whether all numbers are finite and at most `LARGEST` in size."""
    return has_small_squares(array) or bool(np.abs(array).max() <= LARGEST)  # not so for NaN


def has_small_squares(array: NDArray[Any]) -> bool:
    """Return whether the sum of squares proves that all numbers are in range: quicker than to look at each.

    Only for few numbers, since BLAS may start threads for many; and by the one product that warns of no overflow.
    """
    return array.size <= FEW and bool(np.vdot(array, array) < LARGEST**2 / 2)
