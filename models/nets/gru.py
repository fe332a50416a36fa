"""GRU stack: the fallback, the most accurate in distribution (7,095,552 parameters at D = 768)."""

from __future__ import annotations

from models.nets.stack import RecurrentStack, StackConfig


class GRUConfig(StackConfig):
    """Sizes of the GRU stack."""


class GRU(RecurrentStack):
    """Four residual GRU blocks; tensors `blocks.{i}.gru.*`."""

    kind = "gru"
