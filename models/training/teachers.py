"""Distillation: stored versions as one teacher for the net in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.nets.unit import unit
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry
from models.runtimes.torch import build_net


class UnfitTeacher(ValueError):
    """A teacher reads other dimensions or another context length than the net in training."""


class Ensemble(nn.Module):
    """Several nets as one: the direction of the mean of their answers."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    @torch.no_grad()
    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        return unit(torch.stack([net(context) for net in self.nets]).mean(dim=0))


def load_teachers(registry: Registry, versions: Sequence[str], dim: int, length: int) -> Ensemble:
    """Return the teachers `versions`, verified and loaded strictly, for contexts `(B, length, dim)`.

    Raises:
        RegistryError: there is no such version.
        BadCheckpoint: a version must not be used; the message says why.
        UnfitTeacher: a version reads other dimensions or another context length.
    """
    found = [load_checkpoint(registry.find(version).path) for version in versions]
    for version, checkpoint in zip(versions, found, strict=True):
        sizes = (checkpoint.card.dim, checkpoint.card.context_length)
        if sizes != (dim, length):
            raise UnfitTeacher(f"teacher {version} has D, T = {sizes}; the net in training has D, T = {(dim, length)}")
    return Ensemble([build_net(checkpoint) for checkpoint in found]).eval()
