"""Imports checkpoints that `torch.save` wrote: nets are loaded strictly, by the names of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.nets import NETS
from models.registry.checkpoint import BadCheckpoint
from models.training.safe_torch_load import listed, safe_load, shown

MAX_CONTEXT = 4096  # chunks; a Transformer's mask takes the square of it
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of wrappers: DDP, torch.compile, Lightning, a plain attribute
_HEADS = ("nhead", "num_heads", "n_heads", "heads")


class NameMismatch(BadCheckpoint):
    """A state dictionary lacks tensors of the net, or has others; the message lists the first of them."""

    def __init__(self, architecture: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
        self.missing, self.unexpected, self.shapes = missing, unexpected, shapes
        found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        mismatches = "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)
        super().__init__(f"not a state of {architecture}: {mismatches}")


def read_net(
    path: Path, name: str, context_length: int | None = None, report: Callable[[str], None] = lambda message: None
) -> nn.Module:
    """Return the net saved in `path` under the architecture `name`, every tensor loaded by name.

    `lstm_stack` is recognised by its tensor names. T is `context_length`, else that of the saved configuration, else 5.
    A prefix that a wrapper put before every name is removed; `report` is called with a message about it.

    Raises:
        NameMismatch: a tensor is missing, unexpected, or has another shape; the exception has the whole lists.
        BadCheckpoint: the file is not a checkpoint, would run code, or says that it is another net.
    """
    saved = _read(path)
    state, removed = _without_prefixes(saved["model_state_dict"])
    if removed:
        report(f"removed the prefix `{removed}` from the name of every tensor")
    saved = {**saved, "model_state_dict": state}
    architecture = _architecture(saved, name)
    with torch.device("meta"):  # allocates nothing until every tensor confirms the sizes that the file states
        blank = _build(architecture, saved, context_length)
    state = _with_our_positions(state, blank)
    _compare(architecture, blank.state_dict(), state)
    net = _build(architecture, saved, context_length)
    net.load_state_dict(state, strict=True)
    _reject_non_finite(net.state_dict())
    return net.eval()


def _read(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = safe_load(path)
    state = saved.get("model_state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        has = f"it has the keys {listed(list(map(str, saved)))}" if isinstance(saved, dict) else _kind_of(saved)
        raise BadCheckpoint(f"{path}: expected a dictionary with a `model_state_dict` of tensors; {has}")
    if not isinstance(saved.get("model_config") or {}, dict):
        raise BadCheckpoint(f"{path}: `model_config` is not a dictionary")
    hollow = [key for key, tensor in state.items() if not _is_whole(tensor)]
    if hollow:
        raise BadCheckpoint(f"{path}: unusable tensors (empty, not dense, or cut short): {listed(hollow)}")
    return saved


def _kind_of(saved: Any) -> str:
    return f"it holds a {type(saved).__name__}"


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return a state without the prefixes that all its names have, and these prefixes."""
    removed = ""
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        removed += prefix
    return state, removed


def _is_whole(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    return plain and 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _architecture(saved: Mapping[str, Any], name: str) -> str:
    if name not in NETS:
        raise BadCheckpoint(f"unknown net {name!r}; choose from {', '.join(NETS)}")
    stated = str(saved.get("model_type") or name).lower()
    if stated.split("_")[0] != name.split("_")[0]:
        raise BadCheckpoint(f"the file says it is {shown(stated)!r}, not {name!r}")
    stacked = any(key.startswith("blocks.") for key in saved["model_state_dict"])
    return "lstm_stack" if name == "lstm" and stacked else name


def _build(architecture: str, saved: Mapping[str, Any], context_length: int | None) -> nn.Module:
    config_type, net_type = NETS[architecture]
    config = saved.get("model_config") or {}
    try:
        sizes = vars(config_type.from_state(saved["model_state_dict"]))
    except (LookupError, ValueError):  # a tensor that gives a size is missing: `_compare` reports it
        sizes = vars(config_type(**({"dim": config["input_dim"]} if "input_dim" in config else {})))
    head_counts = [config[key] for key in _HEADS if key in config]
    heads = {"heads": head_counts[0]} if head_counts and "heads" in sizes else {}
    length = context_length or config.get("context_length") or sizes["context_length"]
    if not (isinstance(length, int) and 0 < length <= MAX_CONTEXT):
        raise BadCheckpoint(f"a context of {shown(repr(length))} chunks; expected 1 to {MAX_CONTEXT}")
    try:
        net: nn.Module = net_type(config_type(**{**sizes, **heads, "context_length": length}))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"these sizes do not fit {architecture}: {error}") from error
    return net


def _with_our_positions(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    ours = net.state_dict().get("pos_encoder.pe")
    theirs = state.get("pos_encoder.pe")
    if ours is None or theirs is None or theirs.squeeze().shape != ours.squeeze().shape:
        return state
    return {**state, "pos_encoder.pe": theirs.reshape(ours.shape)}  # (max, 1, d) and (1, max, d) are one


def _compare(architecture: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    shapes = [
        f"{name} {tuple(theirs[name].shape)}, expected {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name].shape != theirs[name].shape
    ]
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or unexpected or shapes:
        raise NameMismatch(architecture, missing, unexpected, shapes)


def _reject_non_finite(state: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BadCheckpoint(f"not finite: {', '.join(sorted(broken))}")
