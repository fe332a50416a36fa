"""Reads nets from files of `torch.save` or safetensors: loaded strictly, by the names of their tensors."""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.nets import NETS, BadConfig, config_dict
from models.registry.checkpoint import BadCheckpoint
from models.training.imported import ImportOptions
from models.training.safe_torch_load import listed, safe_load, shown
from models.training.safetensors_file import is_safetensors, read_safetensors

MAX_CONTEXT = 4096  # chunks; a Transformer's mask takes the square of it
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of wrappers: DDP, torch.compile, Lightning, a plain attribute
STATES = ("model_state_dict", "state_dict")  # keys of the state dictionary: the customer's, Lightning's
_EXPECTED = "expected a dictionary with a `model_state_dict` of tensors"
_SEPARATOR = re.compile(r"[\W_]")
_FIRST = ("input_proj.weight", "lstm.weight_ih_l0", "context_encoder.weight")  # (..., width of what a net reads)
_LAST = ("output_proj.weight", "head.3.weight", "residual_net.6.weight")  # (width of what a net answers, ...)
_ARGUMENTS = ("hyper_parameters", "args", "model_config")  # the later, the more it counts
_HEADS = ("nhead", "num_heads", "n_heads", "heads")


class NameMismatch(BadCheckpoint):
    """A state dictionary lacks tensors of the net, or has others; the message lists the first of them."""

    def __init__(
        self, path: Path, architecture: str, missing: list[str], unexpected: list[str], shapes: list[str]
    ) -> None:
        self.missing, self.unexpected, self.shapes = missing, unexpected, shapes
        found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        mismatches = "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)
        super().__init__(f"{path}: not a state of {architecture}: {mismatches}")


def read_net(
    path: Path, name: str, context_length: int | None = None, report: Callable[[str], None] = lambda message: None
) -> nn.Module:
    """Return the net saved in `path` under the architecture `name`; see `net_from`."""
    if name not in NETS:
        raise BadCheckpoint(f"unknown net {name!r}; choose from {', '.join(NETS)}")
    return net_from(path, read_saved(path), ImportOptions(name, None, context_length, report=report))


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
    saved configuration or arguments, else 5. A prefix that a wrapper put before every name is removed, and reported.

    Raises:
        NameMismatch: a tensor is missing, unexpected, or has another shape; the exception has the whole lists.
        BadCheckpoint: there is no state dictionary, or the file says that it is another net.
    """
    state = state_of(path, saved, options)
    if not isinstance(saved.get("model_config") or {}, dict):
        raise BadCheckpoint(f"{path}: `model_config` is not a dictionary")
    _reject_position_scalar(path, state)
    saved = {**saved, "model_state_dict": state}
    architecture = _architecture(path, saved, options)
    net = load_strictly(path, architecture, state, lambda: _build(path, architecture, saved, options.context_length))
    _report_conversion(state, options)
    if "heads" in config_dict(net) and not any(key in _stated_config(saved) for key in _HEADS):
        options.report(f"the file does not say how many attention heads: assumed {config_dict(net)['heads']}")
    return net


def state_of(path: Path, saved: Mapping[Any, Any], options: ImportOptions) -> dict[str, Tensor]:
    """Return the state dictionary in `saved`, without the prefixes of wrappers, which are reported.

    Raises:
        BadCheckpoint: there is none, or a tensor in it is unusable.
    """
    state, removed = _without_prefixes(_state(path, saved))
    if removed:
        options.report(f"removed the prefix `{removed}` from the name of every tensor")
    return state


def load_strictly(path: Path, name: str, state: dict[str, Tensor], make: Callable[[], nn.Module]) -> nn.Module:
    """Return the net that `make` builds, called `name` in messages, with every tensor of `state` loaded by name.

    Raises:
        NameMismatch: a tensor is missing, unexpected, or has another shape; the exception has the whole lists.
        BadCheckpoint: a tensor is not finite.
    """
    with torch.device("meta"):  # allocates nothing until every tensor confirms the sizes that the file states
        blank = make()
    state = _with_our_positions(state, blank)
    _compare(path, name, blank.state_dict(), state)
    net = make()
    net.load_state_dict(state, strict=True)
    _reject_non_finite(path, net.state_dict())
    return net.eval()


def _state(path: Path, saved: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the state dictionary in `saved`: that of the first key in `STATES`, else `saved` itself."""
    key = next((key for key in STATES if key in saved), None)
    state = saved[key] if key else saved
    if not isinstance(state, dict) or not (key or state) or not all(map(_is_named_tensor, state.items())):
        raise BadCheckpoint(f"{path}: {_EXPECTED}; it has the keys {listed(list(map(str, saved)))}")
    hollow = [name for name, tensor in state.items() if not _is_whole(tensor)]
    if hollow:
        raise BadCheckpoint(
            f"{path}: unusable tensors (empty, not dense, not of floating point, or cut short): {listed(hollow)}"
        )
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


def _reject_position_scalar(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise `BadCheckpoint` if the net reads one number more per vector than it answers."""
    widths_in = [state[name].shape[-1] for name in _FIRST if name in state and state[name].ndim == 2]
    widths_out = [state[name].shape[0] for name in _LAST if name in state and state[name].ndim == 2]
    if widths_in and widths_out and widths_in[0] == widths_out[0] + 1:
        raise BadCheckpoint(
            f"{path}: the net reads vectors of width {widths_in[0]} and answers vectors of width {widths_out[0]}; "
            "expected one width. It was trained with a position scalar beside each vector, which is not supported: "
            "a context has no such number"
        )


def _report_conversion(state: Mapping[str, Tensor], options: ImportOptions) -> None:
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    for dtype, count in counts.items():
        if dtype != "float32":
            options.report(f"converted {count} of {len(state)} tensors from {dtype} to float32")


def _architecture(path: Path, saved: Mapping[str, Any], options: ImportOptions) -> str:
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
        raise BadCheckpoint(f"{path}: the file says it is {shown(stated)!r}, not {asked!r}")
    name = asked or (family if family in NETS else _recognised(path, saved, options))
    stacked = any(key.startswith("blocks.") for key in saved["model_state_dict"])
    return "lstm_stack" if name == "lstm" and stacked else name


def _recognised(path: Path, saved: Mapping[str, Any], options: ImportOptions) -> str:
    """Return the only net that has exactly the tensors of the file."""
    fitting = [name for name in NETS if _fits(path, name, saved, options.context_length)]
    if len(fitting) != 1:
        found = f"several nets have these tensors: {', '.join(fitting)}" if fitting else "no net has these tensors"
        names = listed(sorted(saved["model_state_dict"]))
        raise BadCheckpoint(f"{path}: {found}; name one of {', '.join(NETS)} by --architecture; the file has {names}")
    return fitting[0]


def _fits(path: Path, name: str, saved: Mapping[str, Any], context_length: int | None) -> bool:
    try:
        with torch.device("meta"):
            blank = _build(path, name, saved, context_length)
        _compare(path, name, blank.state_dict(), _with_our_positions(saved["model_state_dict"], blank))
    except BadCheckpoint:
        return False
    return True


def _stated_config(saved: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the sizes that the file states: in its configuration, else among the arguments of its training."""
    arguments = [saved.get(key) for key in _ARGUMENTS]
    plain = [vars(each) if isinstance(each, Namespace) else each for each in arguments]
    return {key: value for each in plain if isinstance(each, Mapping) for key, value in each.items()}


def _build(path: Path, architecture: str, saved: Mapping[str, Any], context_length: int | None) -> nn.Module:
    config_type, net_type = NETS[architecture]
    config = _stated_config(saved)
    try:
        sizes = vars(config_type.from_state(saved["model_state_dict"]))
    except (LookupError, ValueError):  # a tensor that gives a size is missing: `_compare` reports it
        sizes = vars(config_type(**({"dim": config["input_dim"]} if "input_dim" in config else {})))
    head_counts = [config[key] for key in _HEADS if key in config]
    heads = {"heads": head_counts[0]} if head_counts and "heads" in sizes else {}
    length = context_length or config.get("context_length") or sizes["context_length"]
    if not (type(length) is int and 0 < length <= MAX_CONTEXT):
        raise BadCheckpoint(f"{path}: a context of {shown(repr(length))} chunks; expected 1 to {MAX_CONTEXT}")
    try:
        net: nn.Module = net_type(config_type(**{**sizes, **heads, "context_length": length}))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path}: these sizes do not fit {architecture}: {error}") from error
    return net


def _with_our_positions(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    ours = net.state_dict().get("pos_encoder.pe")
    theirs = state.get("pos_encoder.pe")
    if ours is None or theirs is None or theirs.squeeze().shape != ours.squeeze().shape:
        return state
    return {**state, "pos_encoder.pe": theirs.reshape(ours.shape)}  # (max, 1, d) and (1, max, d) are one


def _compare(path: Path, architecture: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    shapes = [
        f"{name} {tuple(theirs[name].shape)}, expected {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name].shape != theirs[name].shape
    ]
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or unexpected or shapes:
        raise NameMismatch(path, architecture, missing, unexpected, shapes)


def _reject_non_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BadCheckpoint(f"{path}: not finite: {listed(sorted(broken))}")
