"""Transformer: the research net, a causal decoder that attends to its own input twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.nets.initialisation import add_weighted_mean, zero_parameters
from models.nets.stack import count_blocks
from models.nets.unit import unit


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the Transformer; the defaults are the reference configuration (17.9M parameters)."""

    dim: int = 768
    context_length: int = 5
    model_dim: int = 512
    heads: int = 8
    layers: int = 4
    feedforward_dim: int = 2048
    dropout: float = 0.1
    decay: float | None = None  # of the weighted mean that the net corrects; None: it predicts alone
    max_positions: int = 5000

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> TransformerConfig:
        """Read the sizes off the tensors of a saved net; heads leave no trace and keep the default."""
        model_dim, dim = state["input_proj.weight"].shape
        return cls(
            dim=dim,
            model_dim=model_dim,
            layers=count_blocks(state, "transformer_decoder.layers."),
            feedforward_dim=state["transformer_decoder.layers.0.linear1.weight"].shape[0],
            max_positions=state["pos_encoder.pe"].numel() // model_dim,
        )


class SinusoidalPositions(nn.Module):
    """Add the fixed positions of Vaswani et al. (2017), then drop out; `pe` is `(1, max, d)`."""

    def __init__(self, dim: int, max_positions: int, dropout: float) -> None:
        super().__init__()
        position = torch.arange(max_positions).unsqueeze(1)
        rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        pe = torch.zeros(1, max_positions, dim)
        pe[0, :, 0::2] = torch.sin(position * rate)
        pe[0, :, 1::2] = torch.cos(position * rate)
        self.pe: Tensor
        self.register_buffer("pe", pe)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, model_dim)` to the same shape."""
        out: Tensor = self.dropout(x + self.pe[:, : x.shape[1]])
        return out


class Transformer(nn.Module):
    """Causal decoder layers whose memory is their own input; the last position predicts."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.model_dim
        self.input_proj = nn.Linear(config.dim, dim)
        nn.init.normal_(self.input_proj.weight)  # unit vectors become as large as the positions
        self.pos_encoder = SinusoidalPositions(dim, config.max_positions, config.dropout)
        layer = nn.TransformerDecoderLayer(dim, config.heads, config.feedforward_dim, config.dropout, batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, config.layers)
        last = nn.Linear(dim, config.dim)
        if config.decay is not None:
            zero_parameters(last)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), last)
        mask = nn.Transformer.generate_square_subsequent_mask(config.context_length)
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        x = self.pos_encoder(self.input_proj(context))  # (B, T, model_dim)
        # Saying that the mask is not known to be causal spares a data-dependent check; it still masks.
        x = self.transformer_decoder(x, x, tgt_mask=self.mask, memory_mask=self.mask, tgt_is_causal=False)
        return unit(add_weighted_mean(context, self.head(x[:, -1]), self.config.decay))
