"""A customer's checkpoint is read tensor by tensor, or refused with every name that misfits; nothing in it runs."""

import json
import os
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lvm.cli import app, exit_codes
from models.nets import BadConfig, architecture_of, config_dict
from models.predictor import load_predictor
from models.registry.card import read_card
from models.registry.checkpoint import BadCheckpoint
from models.registry.registry import Registry
from models.training.imported import ImportOptions
from models.training.torch_import import NameMismatch, net_from, read_net, read_saved
from models.vectors import Floats

ROOT = Path(__file__).parents[3]
TYPES = {"amn": "amn", "gmn": "gmn", "gru": "gru", "lstm": "lstm", "lstm_stack": "lstm", "transformer": "transformer"}
Save = Callable[..., Path]
TinyNet = Callable[..., nn.Module]


def saved_as(net: nn.Module, **changes: Any) -> dict[str, Any]:
    """Return what the customer's training loop hands to torch.save."""
    config = config_dict(net)
    said: dict[str, Any] = {"input_dim": config["dim"], "d_model": 512, "dropout": 0.1}
    if "heads" in config:
        said["nhead"] = config["heads"]
    optimizer = torch.optim.AdamW(net.parameters())
    return {
        "model_type": TYPES.get(architecture_of(net)),
        "model_config": said,
        "model_state_dict": dict(net.state_dict()),
        "optimizer_state_dict": optimizer.state_dict(),
        "epoch": 20,
        "val_cosine": 0.5597,
        **changes,
    }


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return a function that saves a checkpoint, with some tensors changed or (None) left out."""

    def write(net: nn.Module, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
        saved = saved_as(net, **changes)
        if tensors:
            state = {**saved["model_state_dict"], **tensors}
            saved["model_state_dict"] = {name: tensor for name, tensor in state.items() if tensor is not None}
        torch.save(saved, tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"

    return write


def answers(net: nn.Module, contexts: Floats) -> Tensor:
    with torch.inference_mode():
        out: Tensor = net.eval()(torch.from_numpy(contexts))
        return out


# What is read


@pytest.mark.parametrize("architecture", TYPES)
def test_the_net_that_was_saved_is_read(
    save: Save, tiny_net: TinyNet, contexts: Callable[..., Floats], architecture: str
) -> None:
    net = tiny_net(architecture)
    read = read_net(save(net), TYPES[architecture])
    assert architecture_of(read) == architecture
    assert not read.training
    assert torch.allclose(answers(read, contexts(9)), answers(net, contexts(9)), atol=1e-6)


@pytest.mark.parametrize("architecture", TYPES)
@pytest.mark.parametrize("config", [None, {}, {"input_dim": 768, "hidden_dim": 9999}])
def test_the_sizes_come_from_the_tensors_not_from_what_the_file_says(
    save: Save, tiny_net: TinyNet, contexts: Callable[..., Floats], architecture: str, config: Any
) -> None:
    net = tiny_net(architecture, **({"model_dim": 64, "heads": 8} if architecture == "transformer" else {}))
    read = read_net(save(net, model_config=config), TYPES[architecture])
    assert torch.allclose(answers(read, contexts(9)), answers(net, contexts(9)), atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 1, 16), (1, 20, 16), (20, 16)])
def test_positions_of_either_layout_are_one(
    save: Save, tiny_net: TinyNet, contexts: Callable[..., Floats], shape: tuple[int, ...]
) -> None:
    net: Any = tiny_net("transformer")
    read = read_net(save(net, {"pos_encoder.pe": net.pos_encoder.pe.reshape(shape).clone()}), "transformer")
    assert torch.allclose(answers(read, contexts(9)), answers(net, contexts(9)), atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 20), (320,), (20, 2, 8), (16, 1, 20)])
def test_rejects_positions_of_any_other_layout(save: Save, tiny_net: TinyNet, shape: tuple[int, ...]) -> None:
    net: Any = tiny_net("transformer")
    with pytest.raises(NameMismatch, match=r"of another shape: pos_encoder\.pe"):
        read_net(save(net, {"pos_encoder.pe": net.pos_encoder.pe.reshape(shape).clone()}), "transformer")


def test_the_positions_that_were_saved_are_the_ones_used(save: Save, tiny_net: TinyNet) -> None:
    net: Any = tiny_net("transformer")
    other = torch.randn(20, 1, 16, generator=torch.Generator().manual_seed(0))
    read: Any = read_net(save(net, {"pos_encoder.pe": other}), "transformer")
    assert torch.equal(read.pos_encoder.pe[0], other[:, 0])


@pytest.mark.parametrize("key", ["nhead", "num_heads", "n_heads", "heads"])
def test_the_heads_are_what_the_file_says(save: Save, tiny_net: TinyNet, key: str) -> None:
    read: Any = read_net(save(tiny_net("transformer"), model_config={key: 4}), "transformer")
    assert read.config.heads == 4


@pytest.mark.parametrize(
    ("given", "said", "expected"), [(None, {}, 5), (None, {"context_length": 7}, 7), (3, {"context_length": 7}, 3)]
)
def test_the_context_length_is_the_one_given_or_said_or_five(
    save: Save, tiny_net: TinyNet, given: int | None, said: dict[str, int], expected: int
) -> None:
    read: Any = read_net(save(tiny_net("amn"), model_config=said), "amn", given)
    assert read.config.context_length == expected


def test_half_precision_is_read_as_single(save: Save, tiny_net: TinyNet) -> None:
    net = tiny_net("amn")
    halves = {name: tensor.half() for name, tensor in net.state_dict().items()}
    read = read_net(save(net, halves), "amn")
    assert all(tensor.dtype == torch.float32 for tensor in read.state_dict().values())
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in read.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reports_the_conversion_to_float32(save: Save, tiny_net: TinyNet, dtype: torch.dtype) -> None:
    net, said = tiny_net("amn"), []
    converted = {name: tensor.to(dtype) for name, tensor in net.state_dict().items()}
    read = read_net(save(net, converted), "amn", report=said.append)
    assert all(torch.equal(tensor, converted[name].float()) for name, tensor in read.state_dict().items())
    assert said == [f"converted 14 of 14 tensors from {str(dtype).removeprefix('torch.')} to float32"]


def test_one_tensor_under_two_names_is_read(save: Save, tiny_net: TinyNet, contexts: Callable[..., Floats]) -> None:
    net: Any = tiny_net("amn")
    net.query_encoder.weight = net.context_encoder.weight
    read = read_net(save(net), "amn")
    assert torch.equal(answers(read, contexts(3)), answers(net, contexts(3)))


@pytest.mark.parametrize("arrange", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_reads_a_bare_state_dictionary_and_one_of_lightning(
    tmp_path: Path, tiny_net: TinyNet, contexts: Callable[..., Floats], arrange: Callable[[Any], Any]
) -> None:
    net = tiny_net("gru")
    torch.save(arrange(net.state_dict()), tmp_path / "x.pt")
    assert torch.equal(answers(read_net(tmp_path / "x.pt", "gru"), contexts(3)), answers(net, contexts(3)))


def test_reads_safetensors(tmp_path: Path, tiny_net: TinyNet, contexts: Callable[..., Floats]) -> None:
    net = tiny_net("lstm")
    save_file(net.state_dict(), tmp_path / "x.pt")
    assert torch.equal(answers(read_net(tmp_path / "x.pt", "lstm"), contexts(3)), answers(net, contexts(3)))


@pytest.mark.parametrize("args", [{"nhead": 4}, Namespace(num_heads=4)])
def test_the_heads_are_what_the_arguments_of_the_training_say(save: Save, tiny_net: TinyNet, args: Any) -> None:
    read: Any = read_net(save(tiny_net("transformer"), model_config=None, args=args), "transformer")
    assert read.config.heads == 4


def test_reports_that_the_number_of_heads_is_assumed(save: Save, tiny_net: TinyNet) -> None:
    said: list[str] = []
    read_net(save(tiny_net("transformer"), model_config=None), "transformer", report=said.append)
    assert said == ["the file does not say how many attention heads: assumed 8"]


# Which net it is


def architecture_in(path: Path, **options: Any) -> str:
    return architecture_of(net_from(path, read_saved(path), ImportOptions("my-net", **options)))


@pytest.mark.parametrize("architecture", [*TYPES, "mamba", "mamba_lnsp"])
def test_recognises_every_net_by_its_tensors(save: Save, tiny_net: TinyNet, architecture: str) -> None:
    assert architecture_in(save(tiny_net(architecture), model_type=None)) == architecture


@pytest.mark.parametrize("said", ["GRU", "gru_stack", "gru-v2", "VectorGRU", 7, ""])
def test_finds_the_net_by_what_the_file_says_or_by_its_tensors(save: Save, tiny_net: TinyNet, said: Any) -> None:
    assert architecture_in(save(tiny_net("gru"), model_type=said)) == "gru"


def test_an_architecture_that_is_asked_for_counts_more_than_a_type_that_is_unknown(
    save: Save, tiny_net: TinyNet
) -> None:
    assert architecture_in(save(tiny_net("lstm_stack"), model_type="VectorLSTM"), architecture="lstm") == "lstm_stack"
    with pytest.raises(NameMismatch):
        architecture_in(save(tiny_net("gru"), model_type="VectorLSTM"), architecture="lstm")


def test_rejects_an_architecture_that_the_file_contradicts(save: Save, tiny_net: TinyNet) -> None:
    with pytest.raises(BadCheckpoint, match=r"checkpoint\.pt: the file says it is 'gru', not 'amn'"):
        architecture_in(save(tiny_net("gru")), architecture="amn")


def test_rejects_tensors_of_no_net_with_what_to_state(save: Save, tiny_net: TinyNet) -> None:
    extra = {"surprise.weight": torch.ones(3)}
    with pytest.raises(BadCheckpoint, match=r"no net has these tensors; name one of amn, .* by --architecture; .*surp"):
        architecture_in(save(tiny_net("amn"), extra, model_type=None))


def test_rejects_an_unknown_architecture(save: Save, tiny_net: TinyNet) -> None:
    with pytest.raises(BadConfig, match="unknown net 'perceptron'; choose from amn, gmn, gru"):
        architecture_in(save(tiny_net("amn")), architecture="perceptron")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("gru", "input_proj.weight"),
        ("lstm", "lstm.weight_ih_l0"),
        ("lstm_stack", "input_proj.weight"),
        ("transformer", "input_proj.weight"),
        ("amn", "context_encoder.weight"),
    ],
)
def test_rejects_a_net_that_reads_a_position_scalar(
    save: Save, tiny_net: TinyNet, architecture: str, name: str
) -> None:
    net = tiny_net(architecture)
    wider = torch.nn.functional.pad(net.state_dict()[name], (0, 1))
    for said in (TYPES[architecture], None):
        with pytest.raises(BadCheckpoint, match=r"reads vectors of width 17 and answers vectors of width 16; .*scalar"):
            architecture_in(save(net, {name: wider}, model_type=said))


def test_a_file_without_a_type_is_what_it_is_called(save: Save, tiny_net: TinyNet) -> None:
    net = tiny_net("gru")
    saved = saved_as(net)
    del saved["model_type"]
    path = save(net)
    torch.save(saved, path)
    assert architecture_of(read_net(path, "gru")) == "gru"


# What does not fit


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("amn", "context_encoder.bias"),
        ("amn", "residual_net.5.weight"),
        ("gru", "blocks.1.gru.weight_hh_l0"),
        ("lstm", "lstm.bias_ih_l1"),
        ("lstm_stack", "blocks.0.norm.bias"),
        ("transformer", "transformer_decoder.layers.1.norm3.weight"),
        ("transformer", "pos_encoder.pe"),
    ],
)
def test_a_missing_tensor_is_listed(save: Save, tiny_net: TinyNet, architecture: str, name: str) -> None:
    with pytest.raises(NameMismatch, match=f"missing: .*{name}") as refused:
        read_net(save(tiny_net(architecture), {name: None}), TYPES[architecture])
    assert name in refused.value.missing
    if name != "pos_encoder.pe":  # which a size is read off
        assert (refused.value.missing, refused.value.unexpected, refused.value.shapes) == ([name], [], [])


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("amn", "context_encoder.weight"),
        ("amn", "residual_net.0.weight"),
        ("gru", "input_proj.weight"),
        ("lstm", "output_proj.weight"),
        ("transformer", "input_proj.weight"),
        ("transformer", "transformer_decoder.layers.0.linear1.weight"),
    ],
)
def test_a_missing_tensor_that_tells_a_size_is_listed_too(
    save: Save, tiny_net: TinyNet, architecture: str, name: str
) -> None:
    with pytest.raises(NameMismatch) as refused:
        read_net(save(tiny_net(architecture), {name: None}), architecture)
    assert refused.value.missing[0] == name or name in refused.value.missing


def test_unexpected_tensors_are_listed_all(save: Save, tiny_net: TinyNet) -> None:
    extra = {"surprise.weight": torch.ones(3), "residual_net.9.bias": torch.ones(3)}
    with pytest.raises(NameMismatch, match=r"unexpected: residual_net\.9\.bias, surprise\.weight$") as refused:
        read_net(save(tiny_net("amn"), extra), "amn")
    assert (refused.value.missing, refused.value.unexpected) == ([], ["residual_net.9.bias", "surprise.weight"])


def test_lists_another_shape_with_the_expected_one(save: Save, tiny_net: TinyNet) -> None:
    with pytest.raises(NameMismatch, match=r"of another shape: query_encoder\.bias \(9,\), expected \(8,\)$"):
        read_net(save(tiny_net("amn"), {"query_encoder.bias": torch.ones(9)}), "amn")


def test_reports_all_mismatches_at_once(save: Save, tiny_net: TinyNet) -> None:
    wrong = {"output_proj.bias": None, "x": torch.ones(1), "blocks.0.norm.bias": torch.ones(17)}
    with pytest.raises(NameMismatch) as refused:
        read_net(save(tiny_net("gru"), wrong), "gru")
    assert refused.value.missing == ["output_proj.bias"]
    assert refused.value.unexpected == ["x"]
    assert refused.value.shapes == ["blocks.0.norm.bias (17,), expected (16,)"]


@pytest.mark.parametrize("shape", [(128,), (), (8, 4, 4), (2, 8, 8)])
def test_rejects_a_size_that_cannot_be_read(save: Save, tiny_net: TinyNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(NameMismatch, match=r"context_encoder\.weight"):
        read_net(save(tiny_net("amn"), {"context_encoder.weight": torch.ones(shape)}), "amn")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model.net."]
)
def test_removes_the_prefixes_of_wrappers_and_says_so(
    save: Save, tiny_net: TinyNet, contexts: Callable[..., Floats], prefix: str
) -> None:
    net, said = tiny_net("gru"), []
    path = save(net, model_state_dict={f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()})
    read = read_net(path, "gru", report=said.append)
    assert torch.equal(answers(read, contexts(3)), answers(net, contexts(3)))
    assert said == [f"removed the prefix `{prefix}` from the name of every tensor"]


def test_keeps_a_prefix_that_only_some_names_have(save: Save, tiny_net: TinyNet) -> None:
    said: list[str] = []
    with pytest.raises(NameMismatch, match=r"unexpected: module\.x"):
        read_net(save(tiny_net("gru"), {"module.x": torch.ones(1)}), "gru", report=said.append)
    assert said == []


def test_shows_only_the_first_names_of_thousands_and_none_that_a_terminal_would_obey(
    save: Save, tiny_net: TinyNet
) -> None:
    extra = {f"x{number}\n\x1b[31m": torch.ones(1) for number in range(5000)} | {"y" * 10_000: torch.ones(1)}
    with pytest.raises(NameMismatch, match=r"and 4981 more") as refused:
        read_net(save(tiny_net("amn"), extra), "amn")
    assert len(refused.value.unexpected) == 5001
    assert len(str(refused.value)) < 2000
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(("said", "name"), [("gru", "amn"), ("amn", "transformer"), ("mamba_s", "amn"), (7, "amn")])
def test_rejects_a_file_that_says_it_is_another_net(save: Save, tiny_net: TinyNet, said: Any, name: str) -> None:
    with pytest.raises(BadCheckpoint, match=f"the file says it is '{said}', not '{name}'"):
        read_net(save(tiny_net("amn"), model_type=said), name)


def test_rejects_the_wrong_net_without_a_type_by_its_names(save: Save, tiny_net: TinyNet) -> None:
    with pytest.raises(NameMismatch, match=r"missing: .*context_encoder\.weight.*unexpected: .*lstm\.bias_hh_l0"):
        read_net(save(tiny_net("lstm"), model_type="amn"), "amn")


def test_rejects_an_unknown_net(save: Save, tiny_net: TinyNet) -> None:
    with pytest.raises(BadCheckpoint, match="unknown net 'perceptron'; choose from amn, gmn, gru"):
        read_net(save(tiny_net("amn")), "perceptron")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_rejects_a_weight_that_is_not_finite_by_name(save: Save, tiny_net: TinyNet, value: float) -> None:
    net = tiny_net("gru")
    weight = net.state_dict()["blocks.1.norm.weight"].double()
    weight[4] = value
    with pytest.raises(BadCheckpoint, match=r"not finite: blocks\.1\.norm\.weight$"):
        read_net(save(net, {"blocks.1.norm.weight": weight}), "gru")


# What means harm


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("place", ["model_state_dict", "model_config", "optimizer_state_dict", "epoch", "everything"])
@pytest.mark.parametrize("legacy", [False, True])
def test_rejects_a_pickle_bomb_without_running_it(tiny_net: TinyNet, tmp_path: Path, place: str, legacy: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "bomb.pt"
    bomb: Any = Bomb(mark)
    saved = bomb if place == "everything" else saved_as(tiny_net("amn"), **{place: bomb})
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadCheckpoint, match=r"bomb\.pt: "):
        read_net(path, "amn")
    assert not mark.exists()


def test_rejects_a_stride_of_zero(save: Save, tiny_net: TinyNet) -> None:
    """Four bytes that say they are terabytes."""
    bomb = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(BadCheckpoint, match=r"cut short.*residual_net\.0\.weight"):
        read_net(save(tiny_net("amn"), {"residual_net.0.weight": bomb}), "amn")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(10**12, 0),
        torch.zeros(10**12, 16, device="meta"),
        torch.zeros(16, 16).to_sparse(),
        torch.zeros(16, 16, dtype=torch.complex64),
        torch.zeros(16, 16, dtype=torch.int64),
    ],
    ids=["empty", "meta", "sparse", "complex", "integer"],
)
def test_rejects_a_tensor_that_is_not_plain(save: Save, tiny_net: TinyNet, tensor: Tensor) -> None:
    with pytest.raises(BadCheckpoint, match=r"cut short\): residual_net\.0\.weight"):
        read_net(save(tiny_net("amn"), {"residual_net.0.weight": tensor}), "amn")


@pytest.mark.parametrize(
    ("architecture", "tensors"),
    [
        ("amn", {"residual_net.0.weight": torch.zeros(10**6, 1)}),
        ("amn", {"context_encoder.weight": torch.zeros(1, 10**6)}),
        ("lstm", {"output_proj.weight": torch.zeros(1, 10**6)}),
        ("gru", {"input_proj.weight": torch.zeros(10**5, 1)}),
        ("gru", {"blocks.999999999.gru.weight_ih_l0": torch.zeros(1)}),
        ("transformer", {"transformer_decoder.layers.999999999.linear1.weight": torch.zeros(1)}),
        ("transformer", {"transformer_decoder.layers.0.linear1.weight": torch.zeros(10**6, 1)}),
    ],
)
def test_rejects_a_small_tensor_for_a_giant_net_before_building_it(
    save: Save, tiny_net: TinyNet, architecture: str, tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(NameMismatch):
        read_net(save(tiny_net(architecture), tensors), architecture)


@pytest.mark.parametrize("length", [10**9, -1, 0.5, "5", [5]])
def test_rejects_an_invalid_context_length(save: Save, tiny_net: TinyNet, length: Any) -> None:
    with pytest.raises(BadCheckpoint, match="a context of"):
        read_net(save(tiny_net("transformer"), model_config={"context_length": length}), "transformer")


@pytest.mark.parametrize("heads", [3, 0, -2, "2"])
def test_rejects_heads_that_cannot_be(save: Save, tiny_net: TinyNet, heads: Any) -> None:
    with pytest.raises(BadCheckpoint):
        read_net(save(tiny_net("transformer"), model_config={"nhead": heads}), "transformer")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_rejects_a_truncated_file(save: Save, tiny_net: TinyNet, share: float) -> None:
    path = save(tiny_net("amn"))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadCheckpoint, match=r"checkpoint\.pt: "):
        read_net(path, "amn")


def test_an_archive_that_climbs_out_of_its_place_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "climb.pt"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../evil", "archive/../../evil", "archive/data.pkl"):
            archive.writestr(name, b"evil")
    with pytest.raises(BadCheckpoint, match=r"climb\.pt: "):
        read_net(path, "amn")
    assert [file.name for file in tmp_path.rglob("*")] == ["deep", "climb.pt"]


@pytest.mark.parametrize(
    "saved",
    [
        [],
        7,
        None,
        "text",
        torch.ones(3),
        {},
        {"model_state_dict": None},
        {"model_state_dict": [torch.ones(3)]},
        {"model_state_dict": {"a": [1.0]}},
        {"model_state_dict": {1: torch.ones(3)}},
    ],
)
def test_rejects_a_file_that_is_not_a_checkpoint(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match="expected a dictionary with a `model_state_dict` of tensors"):
        read_net(tmp_path / "x.pt", "amn")


@pytest.mark.parametrize("config", [[1], "text", 7])
def test_rejects_an_invalid_configuration(save: Save, tiny_net: TinyNet, config: Any) -> None:
    with pytest.raises(BadCheckpoint, match="`model_config` is not a dictionary"):
        read_net(save(tiny_net("amn"), model_config=config), "amn")


def test_lists_missing_names_if_there_are_no_tensors(tmp_path: Path) -> None:
    torch.save({"model_type": "amn", "model_state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(NameMismatch, match=r"missing: context_encoder\.bias, context_encoder\.weight"):
        read_net(tmp_path / "x.pt", "amn")


# The command


Import = Callable[..., tuple[object, str, str]]


@pytest.fixture
def lvm_import(registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Import:
    """Return a function that runs `lvm import` in this process and returns exit code, stdout and stderr."""
    monkeypatch.setenv("LVM_REGISTRY", str(registry.root))

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            exit_codes.run(lambda: app(["import", *map(str, arguments)]))
        return end.value.code, *capsys.readouterr()

    return run


def test_the_command_prints_the_version_it_made(
    lvm_import: Import, save: Save, tiny_net: TinyNet, registry: Registry, contexts: Callable[..., Floats]
) -> None:
    net = tiny_net("lstm")
    code, output, messages = lvm_import(save(net), "--name", "lstm", "--encoder", "tiny-encoder", "--json")
    assert code == 0, messages
    (version,) = registry.versions()
    assert json.loads(output) == {"version": version.version, "id": version.id, "path": str(version.path)}
    served = load_predictor(version.path, device="cpu")
    assert (served.card.encoder, served.card.name, served.card.parameters) == (
        "tiny-encoder",
        "lstm",
        sum(p.numel() for p in net.parameters()),
    )
    assert np.allclose(served.predict_batch(contexts(3)), answers(net, contexts(3)).numpy(), atol=1e-5)


def test_the_version_has_the_name_that_was_given(
    lvm_import: Import, save: Save, tiny_net: TinyNet, registry: Registry
) -> None:
    for name in ("their-best", "their-other"):
        code, _, messages = lvm_import(save(tiny_net("transformer")), "--name", name)
        assert code == 0, messages
    assert {(version.name, read_card(version.path).architecture) for version in registry.versions()} == {
        ("their-best", "transformer"),
        ("their-other", "transformer"),
    }


def test_the_name_of_a_net_is_the_net_that_is_found(
    lvm_import: Import, save: Save, tiny_net: TinyNet, registry: Registry
) -> None:
    assert lvm_import(save(tiny_net("lstm_stack")), "--name", "lstm")[0] == 0
    assert lvm_import(save(tiny_net("amn"), model_type=None), "--name", "gru", "--architecture", "amn")[0] == 0
    assert [version.name for version in registry.versions()] == ["gru", "lstm_stack"]


@pytest.mark.parametrize(
    ("options", "status"), [(("--name", "No Name"), 2), (("--name", "x", "--architecture", "perceptron"), 2)]
)
def test_the_command_refuses_names_that_cannot_be(
    lvm_import: Import, save: Save, tiny_net: TinyNet, options: tuple[str, ...], status: int
) -> None:
    assert lvm_import(save(tiny_net("amn")), *options)[0] == status


def test_the_command_compares_the_cosine_in_the_file_with_that_of_the_served_version(
    lvm_import: Import, save: Save, tiny_net: TinyNet, registry: Registry, corpus_dir: Path, other_dir: Path
) -> None:
    sets = ("--data", f"val={corpus_dir}", "--data", str(other_dir), "--json")
    code, output, messages = lvm_import(save(tiny_net("amn"), args=Namespace(lr=1)), "--name", "mine", *sets)
    assert code == 0, messages
    (version,) = registry.versions()
    card = read_card(version.path)
    here = {name: score["cosine"] for name, score in card.scores.items()}
    assert json.loads(output)["cosine"] == [
        {"data": name, "file": 0.5597, "here": cosine, "differs": abs(cosine - 0.5597) > 0.01}
        for name, cosine in here.items()
    ]
    assert f"the file says 0.5597; here, on val, {here['val']:.4f}; warning: they differ by more than 0.01" in messages
    assert any(f"The file says 0.5597; here, on {other_dir.name}" in limit for limit in card.limits)
    assert card.data["file"] == "checkpoint.pt"
    assert card.data["stated"]["epoch"] == 20
    assert card.data["stated"]["args"] == {"lr": 1}


def test_the_command_says_that_the_file_states_no_cosine(
    lvm_import: Import, save: Save, tiny_net: TinyNet, corpus_dir: Path
) -> None:
    code, output, messages = lvm_import(
        save(tiny_net("amn"), val_cosine=None), "--name", "mine", "--data", corpus_dir, "--json"
    )
    assert code == 0
    assert json.loads(output)["cosine"][0]["file"] is None
    assert "the file states no cosine; here, on " in messages


def test_the_command_refuses_data_of_another_dimension(
    lvm_import: Import, save: Save, tiny_net: TinyNet, registry: Registry, corpus_dir: Path
) -> None:
    net = tiny_net("amn", dim=24)
    code, _, messages = lvm_import(save(net), "--name", "mine", "--data", f"val={corpus_dir}")
    assert code == 65
    assert "val has vectors with D = 16; the model reads D = 24" in messages
    assert registry.versions() == []


def test_the_command_refuses_an_output_of_a_file_that_is_no_onnx(
    lvm_import: Import, save: Save, tiny_net: TinyNet, registry: Registry
) -> None:
    code, _, messages = lvm_import(save(tiny_net("amn")), "--name", "amn", "--output", "y")
    assert code == 65
    assert "is no ONNX file, so it has no output 'y' to choose" in messages
    assert registry.versions() == []


def test_the_command_refuses_a_bad_file_with_its_status_and_the_missing_name(
    lvm_import: Import, save: Save, tiny_net: TinyNet, registry: Registry
) -> None:
    bad = save(tiny_net("amn"), {"query_encoder.bias": None})
    code, output, messages = lvm_import(bad, "--name", "amn", "--json")
    assert (code, output) == (65, "")
    assert "missing: query_encoder.bias" in messages
    assert "Traceback" not in messages
    assert registry.versions() == []
