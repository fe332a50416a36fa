"""A version is loaded exactly as it was written, or rejected with the name of the wrong file or tensor."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from torch import nn

from models.registry import manifest
from models.registry.card import CARD_FILE, Card
from models.registry.checkpoint import (
    GOLDEN_FILE,
    GRAPH_FILE,
    WEIGHTS_FILE,
    BadCheckpoint,
    load_checkpoint,
    parse_checkpoint,
)
from models.registry.registry import Version
from models.training.publish import GOLDEN as CONTEXTS

FILES = [WEIGHTS_FILE, GRAPH_FILE, GOLDEN_FILE, CARD_FILE]
CopyOf = Callable[[Version], Path]
Reseal = Callable[[Path], None]


def test_loads_a_version_as_it_was_written(gru_version: Version, gru_net: nn.Module) -> None:
    checkpoint = load_checkpoint(gru_version.path)
    assert checkpoint.version == gru_version.version
    assert checkpoint.sha256 == manifest.digest((gru_version.path / WEIGHTS_FILE).read_bytes())
    state = gru_net.state_dict()
    assert checkpoint.weights.keys() == state.keys()
    assert all(np.array_equal(checkpoint.weights[name], state[name].numpy()) for name in state)
    assert checkpoint.golden_context.shape == (CONTEXTS, 5, 16)
    assert checkpoint.golden_vector.shape == (CONTEXTS, 16)
    assert {a.dtype for a in (*checkpoint.weights.values(), checkpoint.golden_vector)} == {np.dtype(np.float32)}
    assert checkpoint.card.architecture == "gru"
    assert checkpoint.card.parameters == sum(p.numel() for p in gru_net.parameters())


@pytest.mark.parametrize("version", ["amn_version", "gru_version", "corpus_version"])
def test_sha256sum_accepts_a_version(request: pytest.FixtureRequest, version: str) -> None:
    path = request.getfixturevalue(version).path
    check = subprocess.run(
        ["sha256sum", "--strict", "-c", manifest.CHECKSUMS_FILE], cwd=path, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    assert len(check.stdout.splitlines()) == len(list(path.iterdir())) - 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_rejects_a_flipped_bit_by_file_name(gru_version: Version, copy_of: CopyOf, name: str, share: float) -> None:
    path = copy_of(gru_version) / name
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=f"{name} was altered"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 8, -1])
def test_rejects_a_truncated_file_by_name(gru_version: Version, copy_of: CopyOf, name: str, length: int) -> None:
    path = copy_of(gru_version) / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadCheckpoint, match=f"{name} was altered"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("name", [*FILES, manifest.CHECKSUMS_FILE])
def test_rejects_a_missing_file_by_name(gru_version: Version, copy_of: CopyOf, name: str) -> None:
    path = copy_of(gru_version) / name
    path.unlink()
    with pytest.raises(BadCheckpoint, match=name):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("name", [*FILES, manifest.CHECKSUMS_FILE])
def test_rejects_a_link_by_name(gru_version: Version, copy_of: CopyOf, name: str) -> None:
    path = copy_of(gru_version) / name
    path.unlink()
    path.symlink_to(gru_version.path / name)
    with pytest.raises(BadCheckpoint, match=name):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_reports_a_file_missing_from_the_manifest(
    gru_version: Version, copy_of: CopyOf, rewrite_checksums: Reseal, name: str
) -> None:
    directory = copy_of(gru_version)
    (directory / name).unlink()
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match=f"is not a net: it lacks '{name}'"):
        load_checkpoint(directory)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("garbage", [b"", b"\xff" * 100, b"\x00" * 100, b"{}"], ids=["empty", "ff", "00", "json"])
def test_rejects_garbage_with_valid_checksums(
    gru_version: Version, copy_of: CopyOf, rewrite_checksums: Reseal, name: str, garbage: bytes
) -> None:
    directory = copy_of(gru_version)
    (directory / name).write_bytes(garbage)
    rewrite_checksums(directory)
    if name == GRAPH_FILE:  # which onnxruntime judges: see runtimes/test_runtimes.py
        assert load_checkpoint(directory).graph == garbage
        return
    with pytest.raises(BadCheckpoint):
        load_checkpoint(directory)


def test_an_unlisted_file_is_ignored(gru_version: Version, copy_of: CopyOf) -> None:
    """Only files of the manifest are read, so another file does no harm."""
    directory = copy_of(gru_version)
    (directory / "net.onnx.data").write_bytes(b"stray")
    assert load_checkpoint(directory).sha256 == load_checkpoint(gru_version.path).sha256


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rejects_non_finite_weights_by_tensor(
    gru_version: Version, copy_of: CopyOf, rewrite_checksums: Reseal, value: float
) -> None:
    directory = copy_of(gru_version)
    weights = load((directory / WEIGHTS_FILE).read_bytes())
    weights["blocks.1.gru.bias_hh_l0"][3] = value
    weights["output_proj.weight"][0, 0] = value
    (directory / WEIGHTS_FILE).write_bytes(save(weights))
    rewrite_checksums(directory)
    with pytest.raises(BadCheckpoint, match=r"not finite: blocks\.1\.gru\.bias_hh_l0, output_proj\.weight$"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("context", "vector", "said"),
    [
        ((16, 4, 16), (16, 16), r"the shape \(G, T, D\)"),
        ((16, 5, 15), (16, 16), r"the shape \(G, T, D\)"),
        ((16, 16), (16, 16), r"the shape \(G, T, D\)"),
        ((0, 5, 16), (0, 16), r"the shape \(G, T, D\)"),
        ((16, 5, 16), (15, 16), r"the shape \(G, D\)"),
        ((16, 5, 16), (16, 15), r"the shape \(G, D\)"),
        ((16, 5, 16), (16,), r"the shape \(G, D\)"),
    ],
)
def test_rejects_golden_vectors_of_another_shape(
    gru_version: Version, context: tuple[int, ...], vector: tuple[int, ...], said: str
) -> None:
    files = manifest.read_files(gru_version.path)
    golden = {"context": np.zeros(context, np.float32), "vector": np.zeros(vector, np.float32)}
    with pytest.raises(BadCheckpoint, match=said):
        parse_checkpoint("v", {**files, GOLDEN_FILE: save(golden)})


@pytest.mark.parametrize("name", ["context", "vector"])
def test_rejects_half_the_golden_vectors(gru_version: Version, name: str) -> None:
    files = manifest.read_files(gru_version.path)
    golden = load(files[GOLDEN_FILE])
    with pytest.raises(BadCheckpoint, match=f"lacks '{name}'"):
        parse_checkpoint("v", {**files, GOLDEN_FILE: save({k: a for k, a in golden.items() if k != name})})


def test_rejects_a_card_of_another_dimension(gru_version: Version) -> None:
    files = manifest.read_files(gru_version.path)
    card = Card.from_markdown(files[CARD_FILE].decode())
    with pytest.raises(BadCheckpoint, match=r"golden contexts do not have the shape \(G, T, D\) of its card"):
        parse_checkpoint("v", {**files, CARD_FILE: replace(card, dim=768).to_markdown().encode()})


def test_rejects_a_corpus_as_a_net(corpus_version: Version) -> None:
    with pytest.raises(BadCheckpoint, match="is not a net: it lacks"):
        load_checkpoint(corpus_version.path)


def test_rejects_a_directory_that_is_no_version(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadCheckpoint, match=manifest.CHECKSUMS_FILE):
            load_checkpoint(path)
