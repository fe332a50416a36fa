"""The reranker in training: a 2-layer MLP over standardised features, with the standardising folded in to serve."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RerankerNet(nn.Module):
    """Map features `(B, C, F)` to scores `(B, C)`; `mean` and `scale` `(F,)` are those of the training set."""

    def __init__(self, mean: Tensor, scale: Tensor, hidden_dim: int = 64) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale.clamp_min(1e-6))
        self.hidden = nn.Linear(len(mean), hidden_dim)
        self.output = nn.Linear(hidden_dim, 1, bias=False)  # a constant would order nothing

    def forward(self, features: Tensor) -> Tensor:
        """Score each candidate by itself."""
        out: Tensor = self.output(torch.relu(self.hidden((features - self.mean) / self.scale))).squeeze(-1)
        return out

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `hidden` `(H, F)`, `bias` `(H,)` and `output` `(H,)` of the same function of raw features."""
        weight = self.hidden.weight / self.scale
        return weight, self.hidden.bias - weight @ self.mean, self.output.weight[0]
