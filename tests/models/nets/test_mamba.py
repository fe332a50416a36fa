"""Mamba's scan is the recurrence of the paper, and an untrained Mamba returns the last vector."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.nets import build
from models.nets.mamba import MambaConfig, selective_scan
from models.vectors import Floats


def recurrence(u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One number at a time: h = exp(step a) h + step b u, y = c.h."""
    y = torch.zeros_like(u)
    for batch in range(u.shape[0]):
        for channel in range(u.shape[2]):
            h = torch.zeros(a.shape[1])
            for t in range(u.shape[1]):
                d = step[batch, t, channel]
                h = torch.exp(d * a[channel]) * h + d * b[batch, t] * u[batch, t, channel]
                y[batch, t, channel] = c[batch, t] @ h
    return y


def test_the_scan_is_the_recurrence() -> None:
    draw = torch.Generator().manual_seed(0)
    u, step = (torch.randn(2, 4, 3, generator=draw) for _ in range(2))
    b, c = (torch.randn(2, 4, 5, generator=draw) for _ in range(2))
    given = u, step.abs(), -torch.rand(3, 5, generator=draw), b, c
    assert torch.allclose(selective_scan(*given), recurrence(*given), atol=1e-5)


def test_an_untrained_mamba_predicts_the_last_vector(contexts: Callable[..., Floats]) -> None:
    context = torch.from_numpy(contexts(3))
    net = build("mamba", {"dim": 16, "blocks": 2, "state_dim": 4}).eval()
    assert torch.allclose(net(context), context[:, -1], atol=1e-6)


def test_the_future_does_not_reach_the_past(contexts: Callable[..., Floats], tiny_net: Callable[..., object]) -> None:
    block = tiny_net("mamba").blocks[0]  # type: ignore[attr-defined]
    context = torch.from_numpy(contexts(2))
    changed = context.clone()
    changed[:, -1] = -changed[:, -1]
    with torch.inference_mode():
        assert torch.allclose(block(context)[:, :-1], block(changed)[:, :-1])


def test_the_sizes_are_read_off_a_saved_net() -> None:
    config = MambaConfig(dim=32, blocks=3, state_dim=6, conv=3, expand=1)
    with torch.device("meta"):
        net = build("mamba", vars(config))
    assert MambaConfig.from_state(net.state_dict()) == config
