"""The payload tower answers as the torch module that was trained, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from models.nets.two_tower import PassageTower, PlainPassageTower
from models.registry.checkpoint import BadCheckpoint
from models.retrieval.payload import PayloadTower
from models.runtimes.torch import run_net, state_arrays
from models.vectors import normalise

D = 24


def trained(tower: torch.nn.Module) -> torch.nn.Module:
    """Fill every tensor, also those that start at zero."""
    drawn = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():
        parameter.data.normal_(generator=drawn)
    return tower


def tensors() -> dict[str, Any]:
    return state_arrays(trained(PassageTower(D)).state_dict())


@pytest.mark.parametrize("kind", [PassageTower, PlainPassageTower])
def test_answers_as_the_torch_module(kind: type[torch.nn.Module]) -> None:
    tower = trained(kind(D))
    vectors = normalise(np.random.default_rng(0).standard_normal((500, D)))
    ours = PayloadTower(save(state_arrays(tower.state_dict())), D).run(vectors)
    assert ours.dtype == np.float32
    assert np.abs(ours - run_net(tower, vectors)).max() < 2e-6


@pytest.mark.parametrize(
    "change",
    [{"net.0.bias": np.zeros(D + 1, np.float32)}, {"net.4.bias": np.zeros(D, np.float32)}, {"mlp.0.bias": np.zeros(1)}],
)
def test_rejects_other_tensors(change: dict[str, Any]) -> None:
    with pytest.raises(BadCheckpoint, match="payload tower: tensors have shapes"):
        PayloadTower(save({**tensors(), **change}), D)


def test_rejects_a_missing_tensor_another_dimension_and_an_unreadable_file() -> None:
    lacking = {name: tensor for name, tensor in tensors().items() if name != "net.3.bias"}
    for data, dim in ((save(lacking), D), (save(tensors()), D + 1), (b"nonsense", D)):
        with pytest.raises(BadCheckpoint, match="payload tower"):
            PayloadTower(data, dim)
