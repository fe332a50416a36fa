"""Reads a two-tower from a dictionary that `torch.save` wrote: a query tower and a passage tower (payload in files)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.nets import config_dict
from models.nets.two_tower import PlainPassageTower, TwoTower
from models.registry.checkpoint import BadCheckpoint
from models.training.imported import ImportOptions
from models.training.safe_torch_load import shown
from models.training.torch_import import load_strictly, net_from, state_of

QUERY_KEY, PASSAGE_KEY = "q_tower_state_dict", "p_tower_state_dict"
QUERY_NET = "mamba_lnsp"
# what `args` in the file calls the sizes of the query tower
_ARGS = {"d_model": "width", "n_layers": "blocks", "d_state": "state_dim", "conv_sz": "conv", "expand": "expand"}


def read_two_tower(path: Path, saved: Mapping[Any, Any], options: ImportOptions) -> TwoTower:
    """Return the two-tower in the dictionary `saved` of the file `path`, every tensor loaded by name.

    The query tower is `mamba_lnsp`, unless `options` state another net. Sizes are read off the tensors.

    Raises:
        NameMismatch: a tensor is missing, unexpected, or has another shape; the exception has the whole lists.
        BadCheckpoint: a tower is missing, the towers differ in D, or `args` in the file states other sizes.
    """
    net = options.architecture or QUERY_NET
    query = net_from(path, _tower(path, saved, QUERY_KEY), replace(options, architecture=net))
    config = config_dict(query)
    if net == QUERY_NET:
        _compare_with_args(path, saved.get("args"), config)
    state = state_of(path, _tower(path, saved, PASSAGE_KEY), options)
    passages = load_strictly(path, "the passage tower", state, lambda: PlainPassageTower(config["dim"]))
    return TwoTower(query, passages).eval()


def _tower(path: Path, saved: Mapping[Any, Any], key: str) -> dict[str, Any]:
    if not isinstance(saved.get(key), dict):
        raise BadCheckpoint(f"{path}: expected the dictionaries `{QUERY_KEY}` and `{PASSAGE_KEY}`; it lacks `{key}`")
    return {"model_state_dict": saved[key]}


def _compare_with_args(path: Path, args: Any, config: Mapping[str, Any]) -> None:
    """Raise `BadCheckpoint` if `args`, a dictionary or a namespace, states another size than the tensors have."""
    stated = vars(args) if isinstance(args, Namespace) else args
    for name, size in _ARGS.items():
        found = stated.get(name) if isinstance(stated, dict) else None
        if found is not None and found != config[size]:
            raise BadCheckpoint(
                f"{path}: `args.{name}` is {shown(repr(found))}; the tensors of the query tower have {config[size]}"
            )
