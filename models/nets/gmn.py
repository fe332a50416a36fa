"""GMN, the Gram mixture network: the best net at AMN's cost, and one that sees order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.nets.initialisation import position_weights, zero_parameters
from models.nets.unit import unit

DECAYS = (0.7, 0.0)  # the two mixtures start at the weighted mean and at the last vector


@dataclass(frozen=True)
class GMNConfig:
    """Sizes of GMN; the defaults at D = 768 make 1,126,420 parameters."""

    dim: int = 768
    context_length: int = 5
    gram_dim: int = 256
    hidden_dim: int = 512
    dropout: float = 0.0

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> GMNConfig:
        """Read the sizes off the tensors of a saved net."""
        return cls(
            dim=state["residual_net.8.weight"].shape[0],
            context_length=state["mixtures"].shape[1],
            gram_dim=state["gram_net.0.weight"].shape[0],
            hidden_dim=state["residual_net.0.weight"].shape[0],
        )


class GMN(nn.Module):
    """Mix the context twice, then correct the first mixture by a residual MLP over both.

    The weights of a mixture are learned for each position and shifted by what the context vectors have in
    common with each other: their Gram matrix, which stays what it is when the space is turned, so that
    what is learned of it holds in other domains too.
    """

    def __init__(self, config: GMNConfig) -> None:
        super().__init__()
        self.config = config
        length, hidden = config.context_length, config.hidden_dim
        self.mixtures = nn.Parameter(torch.stack([position_weights(length, decay) for decay in DECAYS]))  # (2, T)
        self.gram_net = nn.Sequential(
            nn.Linear(length**2, config.gram_dim),
            nn.GELU(),
            nn.Linear(config.gram_dim, self.mixtures.numel()),
        )
        self.residual_net = nn.Sequential(
            nn.Linear(len(DECAYS) * config.dim, hidden),
            nn.GELU(),
            nn.LayerNorm(hidden),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.LayerNorm(hidden // 2),
            nn.Dropout(config.dropout),
            nn.Linear(hidden // 2, config.dim),
        )
        zero_parameters(self.gram_net[-1])  # an untrained net predicts the weighted mean
        zero_parameters(self.residual_net[-1])

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        gram = (context @ context.mT).flatten(1)  # (B, T * T)
        weights = self.mixtures + self.gram_net(gram).unflatten(1, self.mixtures.shape)  # (B, 2, T)
        mixed = weights @ context  # (B, 2, D)
        return unit(mixed[:, 0] + self.residual_net(mixed.flatten(1)))
