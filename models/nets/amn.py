"""AMN, the attention mixture network: the primary, smallest and fastest net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.nets.initialisation import zero_parameters
from models.nets.unit import unit


@dataclass(frozen=True)
class AMNConfig:
    """Sizes of AMN; the defaults are the reference configuration (1,510,912 parameters)."""

    dim: int = 768
    context_length: int = 5
    key_dim: int = 256
    hidden_dim: int = 512
    dropout: float = 0.0

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> AMNConfig:
        """Read the sizes off the tensors of a saved net."""
        key_dim, dim = state["context_encoder.weight"].shape
        return cls(dim=dim, key_dim=key_dim, hidden_dim=state["residual_net.0.weight"].shape[0])


class AMN(nn.Module):
    """Mix the context by attention from its mean, then correct the mean by a residual MLP."""

    def __init__(self, config: AMNConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.dim, config.hidden_dim
        self.context_encoder = nn.Linear(dim, config.key_dim)
        self.query_encoder = nn.Linear(dim, config.key_dim)
        last = nn.Linear(hidden // 2, dim)
        zero_parameters(last)  # an untrained net predicts the mean of the context
        self.residual_net = nn.Sequential(
            nn.Linear(2 * dim, hidden),
            nn.GELU(),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.LayerNorm(hidden // 2),
            last,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        baseline = context.mean(dim=1)  # (B, D)
        query = self.query_encoder(baseline) * self.config.key_dim**-0.5  # (B, key_dim)
        # q.(Wk x + bk) = (Wk' q).x + q.bk, and the softmax drops the constant q.bk: one product a
        # context instead of T, and the bias of the keys never matters.
        scores = (query @ self.context_encoder.weight).unsqueeze(1) @ context.mT  # (B, 1, T)
        mixture = (torch.softmax(scores, dim=2) @ context).squeeze(1)  # (B, D)
        residual = self.residual_net(self.dropout(torch.cat([baseline, mixture], dim=1)))
        return unit(baseline + residual)
