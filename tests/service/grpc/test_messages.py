"""The messages: compiled from their source, those of Triton's client, and checked before they are parsed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2

from lvm.errors import Invalid, Malformed
from service.grpc.messages import COMPILED, MAX_OTHER, POOL, SERVICE, check_parts, message_type
from tests.conftest import ROOT

FILE = POOL.FindFileByName("inference.proto")


def test_what_is_committed_is_what_the_source_compiles_to(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    out = tmp_path / "compiled"
    source = COMPILED.with_suffix(".proto")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source.parent}", f"--descriptor_set_out={out}", source]
    subprocess.run(command, check=True, cwd=ROOT)
    assert FileDescriptorSet.FromString(out.read_bytes()) == FileDescriptorSet.FromString(COMPILED.read_bytes())


@pytest.mark.parametrize("name", sorted(FILE.message_types_by_name))
def test_every_field_is_one_of_tritons(name: str) -> None:
    theirs: Any = service_pb2 if name in service_pb2.DESCRIPTOR.message_types_by_name else model_config_pb2
    assert fields(message_type(name).DESCRIPTOR) <= fields(theirs.DESCRIPTOR.message_types_by_name[name])


def fields(message: Any) -> set[tuple[str, int, str, int, bool]]:
    """Return the fields of a message and of those within it."""
    own = {(message.full_name, each.number, each.name, each.type, each.is_repeated) for each in message.fields}
    return own.union(*(fields(inner) for inner in message.nested_types))


def test_every_method_is_one_of_tritons() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for name, method in POOL.FindServiceByName(SERVICE).methods_by_name.items():
        assert theirs[name].input_type.full_name == method.input_type.full_name
        assert theirs[name].output_type.full_name == method.output_type.full_name


def test_tensors_of_any_length_pass_the_check() -> None:
    raw = {"raw_input_contents": [bytes(10**6)], "model_name": "amn"}
    typed = {"inputs": [{"name": "context", "shape": [1, 2], "contents": {"fp32_contents": [1.5] * 300_000}}]}
    for message in (raw, typed):
        check_parts(service_pb2.ModelInferRequest(**message).SerializeToString())


@pytest.mark.parametrize(
    "message",
    [
        {"model_name": "x" * 70_000},
        {"inputs": [{}] * 40_000},
        {"inputs": [{"shape": [1] * 70_000}]},
        {"inputs": [{"contents": {"int64_contents": [1] * 70_000}}]},
        {"inputs": [{"contents": {"bytes_contents": [b""] * 40_000}}]},
        {"raw_input_contents": [b""] * 40_000},
        {"parameters": {str(number): service_pb2.InferParameter() for number in range(20_000)}},
    ],
)
def test_many_parts_are_rejected_before_they_are_parsed(message: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match=f"more than {MAX_OTHER} bytes"):
        check_parts(service_pb2.ModelInferRequest(**message).SerializeToString())


@pytest.mark.parametrize("start", [b"\x3a\xff\xff\x7f", b"\x0b", b"\x3c", b"\xff" * 11, b"\x0a", b"\x2a\xff\x7f"])
def test_bytes_that_are_no_fields_are_malformed(start: bytes) -> None:
    with pytest.raises((Malformed, Invalid)):
        check_parts(start + b"\xff" * 70_000)
