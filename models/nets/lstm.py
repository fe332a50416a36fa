"""The two LSTMs: the reference (two layers and a projection) and the residual stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from models.nets.initialisation import add_weighted_mean, zero_parameters
from models.nets.stack import RecurrentStack, StackConfig, count_blocks
from models.nets.unit import unit


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of the LSTM; the defaults are the reference configuration (5,120,768 parameters)."""

    dim: int = 768
    context_length: int = 5
    hidden_dim: int = 512
    layers: int = 2
    dropout: float = 0.2
    decay: float | None = None  # of the weighted mean that the net corrects; None: it predicts alone

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LSTMConfig:
        """Read the sizes off the tensors of a saved net."""
        dim, hidden_dim = state["output_proj.weight"].shape
        return cls(dim=dim, hidden_dim=hidden_dim, layers=count_blocks(state, "lstm.weight_ih_l"))


class LSTM(nn.Module):
    """A plain LSTM over the context; the last position predicts."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.lstm = nn.LSTM(config.dim, config.hidden_dim, config.layers, batch_first=True, dropout=config.dropout)
        self.output_proj = nn.Linear(config.hidden_dim, config.dim)
        if config.decay is not None:
            zero_parameters(self.output_proj)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        states, _ = self.lstm(context)  # (B, T, hidden)
        return unit(add_weighted_mean(context, self.output_proj(states[:, -1]), self.config.decay))


class LSTMStackConfig(StackConfig):
    """Sizes of the LSTM stack."""


class LSTMStack(RecurrentStack):
    """The customer's other net under the name LSTM (29 October); tensors `blocks.{i}.lstm.*`."""

    kind = "lstm"
