"""Mamba: a stack of selective state spaces, the query tower of the two-tower retriever."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from models.nets.stack import count_blocks
from models.nets.unit import unit


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of Mamba; the defaults are the reference configuration, Mamba-S."""

    dim: int = 768
    context_length: int = 5
    blocks: int = 8
    state_dim: int = 128
    conv: int = 4
    expand: int = 2
    dropout: float = 0.1

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> MambaConfig:
        """Read the sizes off the tensors of a saved net."""
        inner, state_dim = state["blocks.0.a_log"].shape
        dim, conv = state["blocks.0.out_proj.weight"].shape[0], state["blocks.0.conv.weight"].shape[2]
        blocks = count_blocks(state, "blocks.")
        return cls(dim=dim, blocks=blocks, state_dim=state_dim, conv=conv, expand=inner // dim)


def selective_scan(u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Run the recurrence `h = exp(step a) h + step b u`, `y = c.h` over `(B, T, inner)`; return `y` of that shape.

    `step` is `(B, T, inner)`, `a` `(inner, state)`, `b` and `c` `(B, T, state)`. T is a handful, so the scan is a loop
    over time of operations that are as wide as the batch; nothing is gained by a parallel one (Gu and Dao, 2023,
    section 3.3).
    """
    given = (step * u).unsqueeze(3) * b.unsqueeze(2)  # (B, T, inner, state)
    state, answers = given[:, 0], [torch.einsum("bis,bs->bi", given[:, 0], c[:, 0])]
    for t in range(1, u.shape[1]):
        state = torch.exp(step[:, t].unsqueeze(2) * a) * state + given[:, t]
        answers.append(torch.einsum("bis,bs->bi", state, c[:, t]))
    return torch.stack(answers, dim=1)


class MambaBlock(nn.Module):
    """`x + mixer(norm(x))` over `(B, T, D)`: convolution in time, selective scan, gate. Silent until trained."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        inner, self.rank = config.expand * config.dim, math.ceil(config.dim / 16)
        self.norm = nn.RMSNorm(config.dim)
        self.in_proj = nn.Linear(config.dim, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, config.conv, groups=inner, padding=config.conv - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * config.state_dim, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.a_log = nn.Parameter(torch.arange(1.0, config.state_dim + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self._start(inner)

    @torch.no_grad()
    def _start(self, inner: int) -> None:
        """Begin with steps between 0.001 and 0.1, as the paper does, and with an answer of zero."""
        step = torch.exp(torch.rand(inner) * math.log(100) + math.log(0.001))
        self.dt_proj.bias.copy_(torch.log(torch.expm1(step)))
        self.out_proj.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`."""
        u, gate = self.in_proj(self.norm(x)).chunk(2, dim=2)  # (B, T, inner)
        u = silu(self.conv(u.mT)[:, :, : x.shape[1]].mT)
        sizes = [self.rank, self.a_log.shape[1], self.a_log.shape[1]]
        step, b, c = self.x_proj(u).split(sizes, dim=2)
        y = selective_scan(u, softplus(self.dt_proj(step)), -torch.exp(self.a_log), b, c)
        out: Tensor = x + self.dropout(self.out_proj((y + self.skip * u) * silu(gate)))
        return out


class Mamba(nn.Module):
    """Mamba blocks over the context; the last position predicts, at first the last context vector."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(MambaBlock(config) for _ in range(config.blocks))

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit vectors `(B, D)`."""
        x = context
        for block in self.blocks:
            x = block(x)
        return unit(x[:, -1])
