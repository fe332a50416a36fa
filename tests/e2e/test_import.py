"""Files of the customer, as they are: imported, promoted, served, with the answers of the nets that wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lvm.cli import app, exit_codes
from models.registry.registry import Registry
from models.retrieval.corpus import write_corpus
from models.vectors import normalise
from tests.conftest import PATIENCE_S, ROOT, Process, until
from tests.fakes import octets_of

CHECKPOINTS = ROOT / "tests" / "checkpoints"
ENCODER = "tiny-encoder"
State = dict[str, torch.Tensor]


def bare(state: State) -> Any:
    return state


def lightning(state: State) -> Any:
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    return {"state_dict": named, "pytorch-lightning_version": "2.4.0", "epoch": 3, "global_step": 9}


def compiled(state: State) -> Any:
    return {"model_type": "amn", "model_state_dict": {f"_orig_mod.{name}": each for name, each in state.items()}}


MADE: dict[str, Callable[[State], Any]] = {"bare": bare, "lightning": lightning, "compiled": compiled}
KEPT = ("numpy_lr.pt", "numpy_metrics.pt", "args_namespace.pt", "args_path.pt", "ddp.pt", "amn.safetensors")


def run(*arguments: object) -> None:
    """Run a command of `lvm` in this process."""
    with pytest.raises(SystemExit) as end:
        exit_codes.run(lambda: app(list(map(str, arguments))))
    assert end.value.code == 0


class Customer:
    """A registry, a server of it, a data set, and what the nets answered that wrote the files."""

    def __init__(self, server: Process, data: Path) -> None:
        self.server, self.data = server, data
        self.expected = np.load(CHECKPOINTS / "expected.npz")

    def answer(self, alias: str) -> httpx.Response:
        """Return the answer of an alias to the contexts `x`."""
        contexts = self.expected["x"]
        headers = {**octets_of(contexts), "accept": "application/octet-stream"}
        url, content = f"{self.server.url}/predict", contexts.tobytes()
        return httpx.post(url, content=content, params={"model": alias}, headers=headers, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with files, a data set and a registry that has AMN as the primary."""
    root = tmp_path_factory.mktemp("customer")
    for name in KEPT:
        shutil.copy(CHECKPOINTS / name, root)
    state = load_file(CHECKPOINTS / "amn.safetensors")
    for name, make in MADE.items():
        torch.save(make(state), root / f"{name}.pt")
    vectors = normalise(np.random.default_rng(0).standard_normal((60, 40)))
    write_corpus(root / "data", vectors, [{"article_id": 1, "title": "One", "chunks": ["text"] * 60}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LVM_REGISTRY", str(root / "registry"))
        run("import", root / "numpy_lr.pt", "--name", "first", "--data", root / "data", "--encoder", ENCODER)
        (version,) = Registry(root / "registry").versions()
        run("promote", "primary", version.id, "--data", root / "data")
        yield root


@pytest.fixture(scope="module")
def customer(place: Path) -> Iterator[Customer]:
    """A server that follows the registry."""
    server = Process(place / "registry", place / "log", LVM_RELOAD_S="0.05")
    try:
        yield Customer(server, place / "data")
    finally:
        server.popen.kill()
        server.popen.wait()


@pytest.mark.parametrize("file", [*KEPT, *(f"{name}.pt" for name in MADE)])
def test_a_file_of_the_customer_is_imported_promoted_and_answers_as_the_net_that_wrote_it(
    customer: Customer, place: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"their-{file.partition('.')[0]}"
    run("import", place / file, "--name", name, "--encoder", ENCODER, "--data", f"d={customer.data}", "--json")
    made = json.loads(capsys.readouterr().out)
    alias, net = ("fallback", "gru") if file == "ddp.pt" else ("primary", "amn")
    run("promote", alias, made["id"], "--data", customer.data)
    until(lambda: customer.answer(alias).headers.get("x-model-version") == made["version"], f"{made['id']} to answer")
    expected = customer.expected[net]
    vectors = np.frombuffer(customer.answer(alias).content, "<f4").reshape(expected.shape)
    assert made["id"].startswith(f"{name}/")
    assert np.abs(vectors - expected).max() <= 1e-5
