"""Initialisation: a net may start as the weighted mean of its context and learn a correction of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weighted_mean(context: Tensor, decay: float) -> Tensor:
    """Return the mean of contexts `(B, T, D)` in which a vector counts `decay` times its successor, `(B, D)`."""
    return position_weights(context.shape[1], decay).to(context) @ context


def position_weights(length: int, decay: float) -> Tensor:
    """Return the weights of that mean, `(length,)`, which sum to one; the last is the largest."""
    weights = torch.tensor([decay**age for age in reversed(range(length))])
    return weights / weights.sum()


def add_weighted_mean(context: Tensor, correction: Tensor, decay: float | None) -> Tensor:
    """Return the weighted mean plus the net's `correction` `(B, D)`; without a decay the net predicts alone."""
    return correction if decay is None else weighted_mean(context, decay) + correction


@torch.no_grad()
def zero_parameters(layer: nn.Module) -> None:
    """Initialise `layer` so that it returns zero."""
    for parameter in layer.parameters():
        parameter.zero_()
