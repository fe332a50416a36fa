"""Mamba as LNSP's two-tower has it: projections around the blocks, a state that is summed instead of read out.

Differences from `mamba`: the state is not read through C but summed; dt is projected from all inner channels; an input
and an output projection surround the blocks. The tensor names are those of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, relu, silu

from models.nets.stack import count_blocks
from models.nets.unit import unit


@dataclass(frozen=True)
class MambaLnspConfig:
    """Sizes of the net; `width` is the residual stream's, the inner width is `expand * width`."""

    dim: int = 768
    context_length: int = 5
    width: int = 768
    blocks: int = 8
    state_dim: int = 128
    conv: int = 4
    expand: int = 2
    dropout: float = 0.1

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> MambaLnspConfig:
        """Read the sizes off the tensors of a saved net."""
        width, dim = state["backbone.input_proj.weight"].shape
        inner, state_dim = state["backbone.layers.0.A_log"].shape
        conv = state["backbone.layers.0.conv1d.weight"].shape[2]
        blocks = count_blocks(state, "backbone.layers.")
        return cls(dim=dim, width=width, blocks=blocks, state_dim=state_dim, conv=conv, expand=inner // width)


def summed_scan(u: Tensor, step: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Run the recurrence `h = exp(step a) h + b u`, `y = the sum of h over the state` over T; return `y`.

    `u`, `step` and `y` are `(B, T, inner)`, `a` is `(state, inner)`, `b` `(B, T, state)`. The state `h` is
    `(B, state, inner)`, so that sums over the state are products with a row of ones, which runtimes do fastest.
    """
    ones = torch.ones(1, len(a), dtype=a.dtype, device=a.device)
    added = b.sum(2, keepdim=True) * u
    state: Tensor | float = 0.0
    kept = []
    for t in range(1, u.shape[1]):
        entered = b[:, t - 1 : t].mT * u[:, t - 1 : t]
        state = torch.exp(step[:, t : t + 1] * a) * (state + entered)
        kept.append(ones @ state)
    return added + pad(torch.cat(kept, dim=1), (0, 0, 1, 0)) if kept else added


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve each channel of `x` `(B, T, E)` with the present and the past; `weight` is `(E, 1, K)`."""
    size = weight.shape[2]
    padded = pad(x, (0, 0, size - 1, 0))
    answer = reduce(torch.add, (padded[:, k : k + x.shape[1]] * weight[:, 0, k] for k in range(size)))
    return answer if bias is None else answer + bias


def log_one_plus_exp(x: Tensor) -> Tensor:
    """Return `softplus(x)` in operations that onnxruntime vectorises; the absolute error is that of float32 at 1."""
    return relu(x) + torch.log1p(torch.exp(-x.abs()))


class MambaLnspBlock(nn.Module):
    """`x + mixer(norm(x))` over `(B, T, M)`: convolution in time, summed scan, gate."""

    def __init__(self, config: MambaLnspConfig) -> None:
        super().__init__()
        width, inner = config.width, config.expand * config.width
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv, groups=inner, padding=config.conv - 1)
        self.x_proj = nn.Linear(inner, 2 * config.state_dim, bias=False)
        self.dt_proj = nn.Linear(inner, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, config.state_dim + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, M)` to `(B, T, M)`."""
        inner, state_dim = self.A_log.shape
        mixed = self.in_proj(self.norm(x))
        u, gate = mixed[:, :, :inner], mixed[:, :, inner:]
        u = silu(causal_convolution(u, self.conv1d.weight, self.conv1d.bias))
        b = linear(u, self.x_proj.weight[state_dim:])
        step = log_one_plus_exp(self.dt_proj(u))
        y = summed_scan(u, step, -torch.exp(self.A_log).T, b)
        out: Tensor = x + self.dropout(self.out_proj((y + self.D * u) * silu(gate)))
        return out


class MambaLnspBackbone(nn.Module):
    """Projection to the width, blocks, projection to D; in files all its tensors are under `backbone.`."""

    def __init__(self, config: MambaLnspConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(config.dim, config.width)
        self.layers = nn.ModuleList(MambaLnspBlock(config) for _ in range(config.blocks))
        self.output_head = nn.Linear(config.width, config.dim, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to the last position's answer `(B, D)`."""
        x = self.input_proj(context)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.output_head(x[:, -1])
        return out


class MambaLnsp(nn.Module):
    """The query tower of LNSP's two-tower."""

    def __init__(self, config: MambaLnspConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaLnspBackbone(config)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit vectors `(B, D)`."""
        return unit(self.backbone(context))
