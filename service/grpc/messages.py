"""The messages of inference.proto, and a check of their bytes before they are parsed.

They are in a descriptor pool of their own. Other packages of the same process, Triton's client among them, register the
same names in protobuf's default pool, which holds each name once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from lvm.errors import Invalid, Malformed

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
# `make proto` compiles it.
COMPILED = Path(__file__).with_name("inference.binpb")
# Bytes of names, shapes and parameters in a message: a parsed message may take a hundred times their memory.
MAX_OTHER = 2**14
# The fields of a ModelInferRequest that hold a tensor: raw_input_contents, and inputs.contents.fp32_contents.
TENSORS: Mapping[int, Any] = {7: {}, 5: {5: {6: {}}}}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(COMPILED.read_bytes()).file:
        pool.Add(file)
    # Reflection looks in one pool for all services.
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(file.serialized_pb)
    return pool


POOL = _pool()


def message_type(name: str) -> Any:
    """Return the class of a message of inference.proto."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


def parse(kind: Any, body: bytes) -> Any:
    """Return the message of type `kind` in `body`; raises `Malformed`."""
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise Malformed(f"the bytes are not a {kind.DESCRIPTOR.name}") from error


def check_parts(body: bytes) -> None:
    """Check that a ModelInferRequest is little beside its tensors; a short one is, whatever it holds.

    Raises:
        Invalid: more than `MAX_OTHER` bytes are not those of a tensor.
        Malformed: the bytes are not those of a message.
    """
    if len(body) <= 4 * MAX_OTHER:
        return
    try:
        _count_other(body, 0, len(body), TENSORS, MAX_OTHER)
    except IndexError as error:
        raise Malformed("the bytes are not a ModelInferRequest") from error


def _count_other(body: bytes, at: int, end: int, tensors: Mapping[int, Any], most: int) -> int:
    """Return how many bytes between `at` and `end` are not those of `tensors`, at most `most`; raises `Invalid`.

    Raises:
        IndexError: a field ends behind `end`, or has an unknown kind.
    """
    other = 0
    while at < end:
        tag, data = _varint(body, at)
        is_tensor = tag & 7 == BYTES and tag >> 3 in tensors
        data, past = _extent(body, tag & 7, data)
        if past > end:
            raise IndexError
        other += data - at if is_tensor else past - at
        inner = tensors[tag >> 3] if is_tensor else None
        if inner:
            other += _count_other(body, data, past, inner, most - other)
        if other > most:
            raise Invalid(f"more than {MAX_OTHER} bytes of the message are not those of a tensor")
        at = past
    return other


def _extent(body: bytes, kind: int, at: int) -> tuple[int, int]:
    """Return where the data of a field begin and end."""
    if kind == BYTES:
        size, at = _varint(body, at)
        return at, at + size
    if kind == VARINT:
        return at, _varint(body, at)[1]
    if kind not in (FIXED64, FIXED32):
        raise IndexError
    return at, at + (8 if kind == FIXED64 else 4)


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = body[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexError
