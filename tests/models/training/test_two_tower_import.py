"""Their file of two towers becomes a two-tower version that answers as their nets do, or is rejected by name."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.nets.two_tower import PlainPassageTower, TwoTower
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry
from models.runtimes.torch import run_net
from models.training import bundle
from models.training.imported import ImportOptions
from models.training.importing import publish_model, read_model
from models.training.torch_import import NameMismatch
from models.vectors import Floats

TinyNet = Callable[..., nn.Module]
Contexts = Callable[..., Floats]
Save = Callable[..., Path]
ARGS = {"d_model": 16, "n_layers": 2, "d_state": 4, "conv_sz": 4, "expand": 2, "save_dir": "/their/runs"}


@pytest.fixture
def towers(tiny_net: TinyNet) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(tiny_net("mamba_lnsp"), PlainPassageTower(16)).eval()


@pytest.fixture
def save(towers: TwoTower, tmp_path: Path) -> Save:
    """Return a function that saves the towers as their training loop does, with some keys changed."""

    def write(**changes: Any) -> Path:
        saved = {
            "epoch": 4,
            "q_tower_state_dict": dict(towers.query.state_dict()),
            "p_tower_state_dict": dict(towers.payload.state_dict()),
            "optimizer_state_dict": torch.optim.AdamW(towers.parameters()).state_dict(),
            "metrics": {"val_cosine": 0.6326, "val_cosine_std": 0.1214, "negs_per_sample": 4.0},
            "args": ARGS,
            **changes,
        }
        torch.save({key: value for key, value in saved.items() if value is not None}, tmp_path / "epoch4.pt")
        return tmp_path / "epoch4.pt"

    return write


def test_a_version_answers_as_the_towers_in_the_file(
    save: Save, towers: TwoTower, contexts: Contexts, tmp_path: Path, card: Callable[..., Any]
) -> None:
    options = ImportOptions("theirs")
    model = read_model(save(), options)
    version = publish_model(Registry(tmp_path / "registry"), model, options, card(name="x"), {})
    served = bundle.read(version)
    assert (served.card.kind, served.card.architecture, served.card.name) == ("two_tower", "mamba_lnsp", "theirs")
    assert served.card.parameters == sum(parameter.numel() for parameter in towers.parameters())
    given = contexts(7)
    assert np.allclose(served.query.run(given), run_net(towers.query, given), atol=1e-5)
    passages = run_net(towers.payload, given[:, 0])
    assert np.allclose(served.payload(given[:, 0]), passages, atol=1e-3)  # float16, as in an index


def test_prefixes_of_wrappers_are_removed_and_reported(save: Save, towers: TwoTower) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in towers.query.state_dict().items()}
    messages: list[str] = []
    model = read_model(save(q_tower_state_dict=wrapped), ImportOptions("theirs", report=messages.append))
    assert model.facts["config"]["width"] == 16
    assert len(messages) == 1
    assert "`module.`" in messages[0]


@pytest.mark.parametrize("args", [None, {}, "text", Namespace(**ARGS), {**ARGS, "conv_sz": None}])
def test_args_may_be_anything_that_does_not_contradict_the_tensors(save: Save, args: Any) -> None:
    assert read_model(save(args=args), ImportOptions("theirs")).facts["config"]["conv"] == 4


@pytest.mark.parametrize("name", ["d_model", "n_layers", "d_state", "conv_sz", "expand"])
def test_rejects_args_that_contradict_the_tensors(save: Save, name: str) -> None:
    with pytest.raises(BadCheckpoint, match=rf"epoch4.pt: `args.{name}` is 3; .* have {ARGS[name]}"):
        read_model(save(args=Namespace(**{**ARGS, name: 3})), ImportOptions("theirs"))


@pytest.mark.parametrize("key", ["q_tower_state_dict", "p_tower_state_dict"])
def test_rejects_a_file_that_lacks_a_tower(save: Save, key: str) -> None:
    with pytest.raises(BadCheckpoint, match=f"epoch4.pt: .* lacks `{key}`"):
        read_model(save(**{key: None}), ImportOptions("theirs"))


def test_rejects_tensors_that_misfit_by_name(save: Save, towers: TwoTower) -> None:
    state = towers.query.state_dict()
    state["surprise"] = state.pop("backbone.layers.1.D")
    with pytest.raises(NameMismatch) as caught:
        read_model(save(q_tower_state_dict=dict(state)), ImportOptions("theirs"))
    assert (caught.value.missing, caught.value.unexpected) == (["backbone.layers.1.D"], ["surprise"])


def test_rejects_a_passage_tower_of_another_dimension(save: Save) -> None:
    with pytest.raises(NameMismatch, match=r"the passage tower: .*mlp.0.weight \(12, 12\), expected \(16, 16\)"):
        read_model(save(p_tower_state_dict=PlainPassageTower(12).state_dict()), ImportOptions("theirs"))


def test_rejects_a_weight_that_is_not_finite(save: Save, towers: TwoTower) -> None:
    state = towers.payload.state_dict()
    state["mlp.3.bias"] = state["mlp.3.bias"].clone().fill_(torch.inf)
    with pytest.raises(BadCheckpoint, match=r"not finite: mlp.3.bias"):
        read_model(save(p_tower_state_dict=dict(state)), ImportOptions("theirs"))
