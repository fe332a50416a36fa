"""Reads nets from files of `torch.save` or safetensors: loaded strictly, by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.nets import NETS, BadConfig
from models.registry.checkpoint import BadCheckpoint
from models.training.imported import ImportOptions
from models.training.safe_torch_load import listed, safe_load, shown
from models.training.safetensors_file import is_safetensors, read_safetensors

MAX_CONTEXT = 4096  # chunks; a Transformer's mask takes the square of it
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of wrappers: DDP, torch.compile, Lightning, a plain attribute
STATES = ("model_state_dict", "state_dict")  # keys of the state dictionary: the customer's, Lightning's
_EXPECTED = "expected a dictionary with a `model_state_dict` of tensors"
_SEPARATOR = re.compile(r"[\W_]")
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
    """Return the net saved in `path` under the architecture `name`; see `net_from`."""
    if name not in NETS:
        raise BadCheckpoint(f"unknown net {name!r}; choose from {', '.join(NETS)}")
    return net_from(path, read_saved(path), ImportOptions(name, None, context_length, report))


def read_saved(path: Path) -> Mapping[Any, Any]:
    """Return the dictionary that the file holds: of `torch.save`, or of safetensors under `model_state_dict`.

    Raises:
        BadCheckpoint: the file is damaged, would run code, or holds something else.
    """
    saved = read_safetensors(path) if is_safetensors(path) else safe_load(path)
    if not isinstance(saved, dict):
        raise BadCheckpoint(f"{path}: {_EXPECTED}; it holds a {type(saved).__name__}")
    return saved


def net_from(path: Path, saved: Mapping[Any, Any], options: ImportOptions) -> nn.Module:
    """Return the net in the dictionary `saved` of the file `path`, every tensor loaded by name.

    The architecture is the one that `options` state, else the `model_type` of the file, else the only net that has
    exactly these tensors. `lstm_stack` is recognised by its tensor names. T is that of `options`, else that of the
    saved configuration, else 5. A prefix that a wrapper put before every name is removed, and reported.

    Raises:
        NameMismatch: a tensor is missing, unexpected, or has another shape; the exception has the whole lists.
        BadCheckpoint: there is no state dictionary, or the file says that it is another net.
    """
    state = state_of(path, saved, options)
    if not isinstance(saved.get("model_config") or {}, dict):
        raise BadCheckpoint(f"{path}: `model_config` is not a dictionary")
    saved = {**saved, "model_state_dict": state}
    architecture = _architecture(saved, options)
    return load_strictly(architecture, state, lambda: _build(architecture, saved, options.context_length))


def state_of(path: Path, saved: Mapping[Any, Any], options: ImportOptions) -> dict[str, Tensor]:
    """Return the state dictionary in `saved`, without the prefixes of wrappers, which are reported.

    Raises:
        BadCheckpoint: there is none, or a tensor in it is unusable.
    """
    state, removed = _without_prefixes(_state(path, saved))
    if removed:
        options.report(f"removed the prefix `{removed}` from the name of every tensor")
    return state


def load_strictly(name: str, state: dict[str, Tensor], make: Callable[[], nn.Module]) -> nn.Module:
    """Return the net that `make` builds, called `name` in messages, with every tensor of `state` loaded by name.

    Raises:
        NameMismatch: a tensor is missing, unexpected, or has another shape; the exception has the whole lists.
        BadCheckpoint: a tensor is not finite.
    """
    with torch.device("meta"):  # allocates nothing until every tensor confirms the sizes that the file states
        blank = make()
    state = _with_our_positions(state, blank)
    _compare(name, blank.state_dict(), state)
    net = make()
    net.load_state_dict(state, strict=True)
    _reject_non_finite(net.state_dict())
    return net.eval()


def _state(path: Path, saved: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the state dictionary in `saved`: that of the first key in `STATES`, else `saved` itself."""
    key = next((key for key in STATES if key in saved), None)
    state = saved[key] if key else saved
    if not isinstance(state, dict) or not (key or state) or not all(map(_is_named_tensor, state.items())):
        raise BadCheckpoint(f"{path}: {_EXPECTED}; it has the keys {listed(list(map(str, saved)))}")
    hollow = [name for name, tensor in state.items() if not _is_whole(tensor)]
    if hollow:
        raise BadCheckpoint(f"{path}: unusable tensors (empty, not dense, or cut short): {listed(hollow)}")
    return state


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


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


def _architecture(saved: Mapping[str, Any], options: ImportOptions) -> str:
    """Return the name of the net in the file.

    Raises:
        BadConfig: `options` name an architecture that does not exist.
        BadCheckpoint: the file says that it is another net, or nothing says which it is.
    """
    asked = options.architecture or (options.name if options.name in NETS else None)
    if asked is not None and asked not in NETS:
        raise BadConfig(f"unknown net {asked!r}; choose from {', '.join(NETS)}")
    stated = str(saved.get("model_type") or "").lower()
    family = _SEPARATOR.split(stated)[0]
    is_other = family in NETS if options.architecture else bool(stated)
    if asked and is_other and family != asked.split("_")[0]:
        raise BadCheckpoint(f"the file says it is {shown(stated)!r}, not {asked!r}")
    name = asked or (family if family in NETS else _recognised(saved, options))
    stacked = any(key.startswith("blocks.") for key in saved["model_state_dict"])
    return "lstm_stack" if name == "lstm" and stacked else name


def _recognised(saved: Mapping[str, Any], options: ImportOptions) -> str:
    """Return the only net that has exactly the tensors of the file."""
    fitting = [name for name in NETS if _fits(name, saved, options.context_length)]
    if len(fitting) != 1:
        found = f"several nets have these tensors: {', '.join(fitting)}" if fitting else "no net has these tensors"
        names = listed(sorted(saved["model_state_dict"]))
        raise BadCheckpoint(f"{found}; state one of {', '.join(NETS)} by --architecture; the file has {names}")
    return fitting[0]


def _fits(name: str, saved: Mapping[str, Any], context_length: int | None) -> bool:
    try:
        with torch.device("meta"):
            blank = _build(name, saved, context_length)
        _compare(name, blank.state_dict(), _with_our_positions(saved["model_state_dict"], blank))
    except BadCheckpoint:
        return False
    return True


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
