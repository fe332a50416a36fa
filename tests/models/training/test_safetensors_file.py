"""A safetensors file is read as tensors and texts, or rejected with a reason."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.registry.checkpoint import BadCheckpoint
from models.training.safetensors_file import is_safetensors, read_safetensors


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header_of(**tensor: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **tensor}}).encode()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with one tensor and its metadata."""
    save_file(
        {"a": torch.ones(3)}, tmp_path / "x.safetensors", {"epoch": "3", "model_type": "amn", "deep": "[" * 99_999}
    )
    return tmp_path / "x.safetensors"


def test_reads_tensors_and_metadata(file: Path) -> None:
    saved = read_safetensors(file)
    assert (saved["epoch"], saved["model_type"]) == (3, "amn")
    assert torch.equal(saved["model_state_dict"]["a"], torch.ones(3))


def test_knows_a_file_by_its_first_bytes_or_its_name(file: Path, tmp_path: Path) -> None:
    assert is_safetensors(file.rename(tmp_path / "x.pt"))
    torch.save({}, tmp_path / "y.pt")
    assert not is_safetensors(tmp_path / "y.pt")
    (tmp_path / "y.SAFETENSORS").touch()
    assert is_safetensors(tmp_path / "y.SAFETENSORS")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 62) + b"{}",
        framed(header_of(shape=[10**9, 10**9]), bytes(4)),
        framed(header_of(dtype="F64"), bytes(4)),
        framed(header_of(data_offsets=[0, 10**12]), bytes(4)),
        framed(header_of(data_offsets=[-4, 0]), bytes(4)),
        framed(header_of(), b""),
        framed(header_of(), bytes(8)),
        framed(b'{"a":' * 100_000),
        framed(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        framed(b"[]"),
    ],
    ids=["empty", "short", "length", "shape", "type", "place", "negative", "cut", "more", "deep", "UTF-8", "list"],
)
def test_rejects_a_header_that_does_not_fit_its_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"x\.safetensors: not a safetensors file, or damaged \(.+\)"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_does_not_wait_for_an_irregular_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match="expected a regular file"):
        is_safetensors(tmp_path / "x.safetensors")
