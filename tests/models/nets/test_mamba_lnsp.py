"""Their query tower computes the formula of its description, read here as loops over numbers, for any T."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.nets import build
from models.nets.mamba_lnsp import causal_convolution, log_one_plus_exp
from models.nets.two_tower import PlainPassageTower
from models.vectors import Floats

Contexts = Callable[..., Floats]


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def layer_by_the_book(layer: Any, x: Floats) -> Floats:
    """Map the `(T, M)` of one context as the description says, in float64."""
    w = {name: tensor.detach().double().numpy() for name, tensor in layer.state_dict().items()}
    inner, width = w["A_log"].shape
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * w["norm.weight"]
    a, gate = np.split(normed @ w["in_proj.weight"].T, 2, axis=1)
    size = w["conv1d.weight"].shape[2]
    past = np.vstack([np.zeros((size - 1, inner)), a])
    taps = w["conv1d.weight"][:, 0].T  # (conv, E)
    a = silu(np.array([(past[t : t + size] * taps).sum(axis=0) for t in range(len(a))]) + w["conv1d.bias"])
    b = (a @ w["x_proj.weight"].T)[:, width:]
    step = np.log1p(np.exp(a @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
    state, answers = np.zeros((inner, width)), []
    for t in range(len(a)):
        state = np.exp(-np.exp(w["A_log"]) * step[t][:, None]) * state + np.outer(a[t], b[t])
        answers.append(state.sum(axis=1) + w["D"] * a[t])
    return x + (np.array(answers) * silu(gate)) @ w["out_proj.weight"].T


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_the_net_is_its_description(contexts: Contexts, length: int) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 8, "width": 12, "blocks": 2, "state_dim": 3, "conv": 3, "context_length": length}
    net: Any = build("mamba_lnsp", sizes).eval()
    for name, tensor in net.named_parameters():
        if name.endswith(("A_log", ".D")):
            torch.nn.init.normal_(tensor)
    given = contexts(3, dim=8, length=length)
    into, out = net.backbone.input_proj, net.backbone.output_head
    for context, answer in zip(given, net(torch.from_numpy(given)).detach().numpy(), strict=True):
        x = context @ into.weight.detach().numpy().T + into.bias.detach().numpy()
        for layer in net.backbone.layers:
            x = layer_by_the_book(layer, x)
        last = x[-1] @ out.weight.detach().numpy().T
        assert np.allclose(answer, last / np.linalg.norm(last), atol=1e-6)


def test_the_reference_configuration_has_exactly_its_parameters() -> None:
    with torch.device("meta"):
        query, passages = build("mamba_lnsp", {}), PlainPassageTower(768)
    count = [sum(parameter.numel() for parameter in net.parameters()) for net in (query, passages)]
    assert count == [53_177_088, 1_182_720]


def test_the_convolution_is_that_of_torch_cut_to_the_past() -> None:
    layer = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(causal_convolution(x, layer.weight, layer.bias), layer(x.mT)[:, :, :5].mT, atol=1e-6)


def test_log_one_plus_exp_is_softplus_at_any_size() -> None:
    x = torch.tensor([-200.0, -20, -1, 0, 1, 20, 200])
    assert torch.allclose(log_one_plus_exp(x), torch.nn.functional.softplus(x), rtol=1e-6, atol=1e-7)
