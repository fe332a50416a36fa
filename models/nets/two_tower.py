"""The two-tower: one tower reads contexts, the other passages (`payload` in files); both end in one space.

`models.retrieval.payload` computes what a tower of passages does without torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models.nets.unit import unit

TEMPERATURE = 0.07


class PassageTower(nn.Module):
    """The tower of passages, `payload` in files: a residual MLP over one vector, at first the vector itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        last = nn.Linear(dim, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), last)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map unit vectors `(N, D)` to unit vectors `(N, D)`."""
        return unit(vectors + self.net(vectors))


class PlainPassageTower(nn.Module):
    """A tower of passages as LNSP's files have it: the same MLP, but its answer is not added to the vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """Map unit vectors `(N, D)` to unit vectors `(N, D)`."""
        return unit(self.mlp(vectors))


class TwoTower(nn.Module):
    """A query tower, any net of `(B, T, D)` to `(B, D)`, beside a passage tower."""

    def __init__(self, query: nn.Module, payload: nn.Module) -> None:
        super().__init__()
        self.query = query
        self.payload = payload

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit queries `(B, D)`."""
        answer: Tensor = self.query(context)
        return answer


def info_nce(query: Tensor, positive: Tensor, negative: Tensor, is_own: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss of a batch, its other positives and its own negatives being the wrong answers.

    `query` and `positive` are `(B, D)`, `negative` `(B, K, D)`, all unit; `is_own` `(B, B)` says which positive is in
    whose context, for these are no wrong answers: a caller has them already. (van den Oord et al., 2018; both ways as
    in CLIP, Radford et al., 2021.)
    """
    among = (query @ positive.T / TEMPERATURE).masked_fill(is_own, -torch.inf)  # (B, B)
    against = torch.einsum("bd,bkd->bk", query, negative) / TEMPERATURE
    truth = torch.arange(len(query), device=query.device)
    return (cross_entropy(torch.cat([among, against], dim=1), truth) + cross_entropy(among.T, truth)) / 2
