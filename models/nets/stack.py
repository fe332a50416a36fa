"""The residual recurrent stack that GRU and the customer's second LSTM share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from models.nets.initialisation import add_weighted_mean, zero_parameters
from models.nets.unit import unit


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return how many numbered parts `prefix{i}` the tensor names mention."""
    indices = (name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix))
    return len({index for index in indices if index.isdecimal()})


@dataclass(frozen=True)
class StackConfig:
    """Sizes of a residual recurrent stack; the defaults are the reference configuration."""

    dim: int = 768
    context_length: int = 5
    hidden_dim: int = 512
    blocks: int = 4
    dropout: float = 0.0
    decay: float | None = None  # of the weighted mean that the net corrects; None: it predicts alone

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Read the sizes off the tensors of a saved net."""
        hidden_dim, dim = state["input_proj.weight"].shape
        return cls(dim=dim, hidden_dim=hidden_dim, blocks=count_blocks(state, "blocks."))


def gru_in_steps(gru: Any, x: Tensor) -> Tensor:
    """Map `(B, T, hidden)` to the states of the one-layer `gru`, written out as products of matrices.

    It starts from zero, so the first step needs no product with the state: a tenth of all operations.
    """
    size, gates = gru.hidden_size, 2 * gru.hidden_size  # the gates are reset and update
    gate_weight, weight = gru.weight_hh_l0[:gates].T, gru.weight_hh_l0[gates:]
    gate_bias, bias = gru.bias_hh_l0[:gates], gru.bias_hh_l0[gates:]
    given = linear(x, gru.weight_ih_l0, gru.bias_ih_l0 + pad(gate_bias, (0, size)))  # (B, T, 3 hidden)
    states: list[Tensor] = []
    for t in range(x.shape[1]):
        gate, memory = given[:, t, :gates], bias
        if states:
            gate, memory = torch.addmm(gate, states[-1], gate_weight), linear(states[-1], weight, bias)
        reset, update = torch.sigmoid(gate).chunk(2, dim=1)
        new = torch.tanh(given[:, t, gates:] + reset * memory)
        states.append(new + update * (states[-1] - new) if states else new - update * new)
    return torch.stack(states, dim=1)


class RecurrentBlock(nn.Module):
    """`x = LayerNorm(x + cell(x))` over `(B, T, hidden)`; `kind` names the cell and its tensors."""

    def __init__(self, kind: str, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        cell = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
        self.kind = kind
        self.add_module(kind, cell(hidden_dim, hidden_dim, batch_first=True))
        self.norm = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self._start_silent(hidden_dim)

    @torch.no_grad()
    def _start_silent(self, hidden_dim: int) -> None:
        # Both cells keep the weights of their candidate state as the third block of rows; with these
        # at zero the cell answers zero, and an untrained block passes its input on.
        for name, tensor in getattr(self, self.kind).named_parameters():
            if not name.startswith("weight_hh"):
                tensor[2 * hidden_dim : 3 * hidden_dim].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, hidden)` to `(B, T, hidden)`."""
        cell = getattr(self, self.kind)
        in_steps = self.kind == "gru" and torch.compiler.is_exporting()
        states = gru_in_steps(cell, x) if in_steps else cell(x)[0]
        out: Tensor = self.norm(x + self.dropout(states))
        return out


class RecurrentStack(nn.Module):
    """Project in, residual blocks, project the last position out."""

    kind: ClassVar[str]

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        self.input_proj = nn.Linear(config.dim, hidden)
        self.blocks = nn.ModuleList(RecurrentBlock(self.kind, hidden, config.dropout) for _ in range(config.blocks))
        self.output_proj = nn.Linear(hidden, config.dim)
        nn.init.orthogonal_(self.input_proj.weight)
        zero_parameters(self.output_proj)
        with torch.no_grad():
            self.input_proj.bias.zero_()
            if config.decay is None:  # an untrained stack predicts the last context vector
                self.output_proj.weight.copy_(self.input_proj.weight.T)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        x = self.input_proj(context)  # (B, T, hidden)
        for block in self.blocks:
            x = block(x)
        return unit(add_weighted_mean(context, self.output_proj(x[:, -1]), self.config.decay))
