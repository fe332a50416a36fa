"""The nets: each a config dataclass and a module, `(B, T, D)` contexts in, unit `(B, D)` next vectors out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from models.nets.amn import AMN, AMNConfig
from models.nets.gmn import GMN, GMNConfig
from models.nets.gru import GRU, GRUConfig
from models.nets.lstm import LSTM, LSTMConfig, LSTMStack, LSTMStackConfig
from models.nets.mamba import Mamba, MambaConfig
from models.nets.mamba_lnsp import MambaLnsp, MambaLnspConfig
from models.nets.transformer import Transformer, TransformerConfig


class BadConfig(ValueError):
    """No net has this name, or the net does not accept this configuration."""


NETS: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "amn": (AMNConfig, AMN),
    "gmn": (GMNConfig, GMN),
    "gru": (GRUConfig, GRU),
    "lstm": (LSTMConfig, LSTM),
    "lstm_stack": (LSTMStackConfig, LSTMStack),
    "mamba": (MambaConfig, Mamba),
    "mamba_lnsp": (MambaLnspConfig, MambaLnsp),
    "transformer": (TransformerConfig, Transformer),
}


def build(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """Return the freshly initialised net `architecture` with `config`.

    Raises:
        BadConfig: no net has this name, or its config has no such key.
    """
    if architecture not in NETS:
        raise BadConfig(f"unknown net {architecture!r}; choose from {', '.join(NETS)}")
    config_type, net_type = NETS[architecture]
    try:
        net: nn.Module = net_type(config_type(**config))
    except TypeError as error:
        raise BadConfig(f"{architecture}: {error}") from error
    return net


def config_dict(net: nn.Module) -> dict[str, Any]:
    """Return the configuration with which `build` makes `net` again."""
    config: Any = net.config
    return asdict(config)


def architecture_of(net: nn.Module) -> str:
    """Return the name under which `net` is built.

    Raises:
        BadConfig: the class is not in `NETS`.
    """
    for name, (_, net_type) in NETS.items():
        if type(net) is net_type:
            return name
    raise BadConfig(f"{type(net).__module__}.{type(net).__qualname__} is not one of the nets: {', '.join(NETS)}")
