"""Every net has the reference size, maps any (B, T, D) to unit vectors, and treats a batch like single rows."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.nets import NETS, BadConfig, architecture_of, build, config_dict
from models.nets.initialisation import weighted_mean
from models.nets.stack import count_blocks, gru_in_steps
from models.nets.unit import unit
from models.vectors import Floats

TinyNet = Callable[..., nn.Module]
Contexts = Callable[..., Floats]
PARAMETERS = {"amn": 1_510_912, "gmn": 1_126_420, "gru": 7_095_552, "lstm": 5_120_768, "transformer": 17_867_520}


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_the_reference_configuration_has_exactly_its_parameters(architecture: str) -> None:
    with torch.device("meta"):
        net = build(architecture, {"dim": 768})
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[architecture]


def test_the_defaults_are_the_reference_configuration() -> None:
    with torch.device("meta"):
        for architecture in NETS:
            config = config_dict(build(architecture, {}))
            assert (config["dim"], config["context_length"]) == (768, 5)


def test_the_tensors_have_the_customers_names() -> None:
    with torch.device("meta"):
        names = {architecture: set(build(architecture, {}).state_dict()) for architecture in NETS}
    parts = ("context_encoder", "query_encoder", *(f"residual_net.{i}" for i in (0, 2, 3, 5, 6)))
    assert names["amn"] == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    cell = [f"{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")]
    for architecture, kind in {"gru": "gru", "lstm_stack": "lstm"}.items():
        blocks = {f"blocks.{i}.{kind}.{name}" for i in range(4) for name in cell}
        norms = {f"blocks.{i}.norm.{name}" for i in range(4) for name in ("weight", "bias")}
        ends = {f"{end}.{name}" for end in ("input_proj", "output_proj") for name in ("weight", "bias")}
        assert names[architecture] == blocks | norms | ends
    layers = {f"lstm.{name[:-1]}{layer}" for name in cell for layer in range(2)}
    assert names["lstm"] == layers | {"output_proj.weight", "output_proj.bias"}
    assert {"input_proj.weight", "pos_encoder.pe", "head.0.weight", "head.2.weight", "head.3.bias"} < names[
        "transformer"
    ]
    assert "transformer_decoder.layers.3.multihead_attn.in_proj_weight" in names["transformer"]
    assert "mask" not in names["transformer"]


@pytest.mark.parametrize("architecture", NETS)
@pytest.mark.parametrize(("dim", "length", "batch"), [(16, 5, 3), (7, 1, 1), (24, 9, 2)])
def test_any_dimension_and_length_give_unit_vectors(
    tiny_net: TinyNet, contexts: Contexts, architecture: str, dim: int, length: int, batch: int
) -> None:
    net = tiny_net(architecture, dim=dim, context_length=length)
    answer = net(torch.from_numpy(contexts(batch, dim, length)))
    assert answer.shape == (batch, dim)
    assert answer.dtype == torch.float32
    assert torch.allclose(answer.norm(dim=1), torch.ones(batch), atol=1e-6)


def test_unit_vectors_are_those_of_torch_and_zero_stays_zero() -> None:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-20], [1e15], [0.0]])
    assert torch.allclose(unit(x), normalize(x, dim=1))


@pytest.mark.parametrize("architecture", NETS)
def test_the_gradient_reaches_every_tensor(tiny_net: TinyNet, contexts: Contexts, architecture: str) -> None:
    net = tiny_net(architecture).train()
    answer = net(torch.from_numpy(contexts(8)))
    (answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    silent = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == ({"context_encoder.bias"} if architecture == "amn" else set())  # which the softmax drops


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("architecture", NETS)
@given(batch=st.integers(2, 33), seed=st.integers(0, 1000))
def test_a_batch_of_n_is_n_singles(
    tiny_net: TinyNet, contexts: Contexts, architecture: str, batch: int, seed: int
) -> None:
    net = tiny_net(architecture)
    context = torch.from_numpy(contexts(batch, seed=seed))
    with torch.inference_mode():
        together, alone = net(context), torch.cat([net(row) for row in context.split(1)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("architecture", NETS)
def test_every_vector_of_the_context_counts(tiny_net: TinyNet, contexts: Contexts, architecture: str) -> None:
    net = tiny_net(architecture)
    context = torch.from_numpy(contexts(1))
    other = torch.from_numpy(contexts(1, seed=9))
    with torch.inference_mode():
        before = net(context)
        for position in range(context.shape[1]):
            changed = context.clone()
            changed[0, position] = other[0, position]
            assert (net(changed) - before).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", NETS)
def test_a_net_is_built_again_from_its_config(tiny_net: TinyNet, contexts: Contexts, architecture: str) -> None:
    net = tiny_net(architecture)
    assert architecture_of(net) == architecture
    again = build(architecture_of(net), config_dict(net)).eval()
    again.load_state_dict(net.state_dict(), strict=True)
    context = torch.from_numpy(contexts(4))
    with torch.inference_mode():
        assert torch.equal(again(context), net(context))


@pytest.mark.parametrize("architecture", NETS)
def test_the_sizes_are_read_off_a_state(tiny_net: TinyNet, architecture: str) -> None:
    net = tiny_net(architecture, dim=12, **({"feedforward_dim": 24} if architecture == "transformer" else {}))
    read = asdict(NETS[architecture][0].from_state(net.state_dict()))
    untold = {"dropout", "context_length", "heads", "decay"}  # no tensor tells these
    config = config_dict(net)
    assert {k: v for k, v in read.items() if k not in untold} == {k: v for k, v in config.items() if k not in untold}


@pytest.mark.parametrize("architecture", ["gru", "lstm", "lstm_stack", "transformer", "gmn"])
def test_an_untrained_net_that_corrects_the_weighted_mean_predicts_it(contexts: Contexts, architecture: str) -> None:
    context = torch.from_numpy(contexts(8, dim=512))
    net = build(architecture, {"dim": 512, **({} if architecture == "gmn" else {"decay": 0.7})}).eval()
    weights = torch.tensor([0.7**4, 0.7**3, 0.7**2, 0.7, 1])
    with torch.inference_mode():
        assert torch.allclose(net(context), normalize((context.mT @ weights), dim=1), atol=1e-6)


@pytest.mark.parametrize("architecture", ["gru", "lstm", "lstm_stack", "transformer"])
def test_a_correction_is_added_to_the_weighted_mean_and_to_nothing_else(
    tiny_net: TinyNet, contexts: Contexts, architecture: str
) -> None:
    """With the same weights, the net without a decay returns the direction of the correction."""
    context = torch.from_numpy(contexts(8))
    alone, correcting = tiny_net(architecture), tiny_net(architecture, decay=0.5)
    correcting.load_state_dict(alone.state_dict(), strict=True)
    start = weighted_mean(context, 0.5)
    with torch.inference_mode():
        a, b = alone(context), correcting(context)
        residual = (start * b).sum(1, keepdim=True) * b - start  # of the start, what is across the answer
        across = a - (a * b).sum(1, keepdim=True) * b
    assert torch.allclose(normalize(across, dim=1), normalize(residual, dim=1), atol=1e-3)


def test_rejects_an_unknown_net_or_size() -> None:
    with pytest.raises(BadConfig, match="choose from"):
        build("perceptron", {})
    with pytest.raises(BadConfig, match="surprise"):
        build("amn", {"surprise": 1})


@given(st.lists(st.integers(0, 10**12), max_size=5))
def test_blocks_are_counted_by_name_not_by_the_highest_number(indices: list[int]) -> None:
    names = [f"blocks.{i}.gru.{kind}" for i in indices for kind in ("weight", "bias")]
    assert count_blocks([*names, "blocks.x.gru", "input_proj.weight"], "blocks.") == len(set(indices))


# AMN


def textbook_amn(net: Any, context: Tensor) -> Tensor:
    """The textbook formula: keys of every context vector, one query, softmax(q.k / sqrt(d))."""
    baseline = context.mean(dim=1)
    keys, query = net.context_encoder(context), net.query_encoder(baseline)
    scores = torch.einsum("btk,bk->bt", keys, query) / np.sqrt(keys.shape[2])
    mixture = torch.einsum("bt,btd->bd", torch.softmax(scores, dim=1), context)
    return normalize(baseline + net.residual_net(torch.cat([baseline, mixture], dim=1)), dim=1)


def test_amn_is_the_textbook_formula(tiny_net: TinyNet, contexts: Contexts) -> None:
    net = tiny_net("amn")
    with torch.no_grad():
        for linear in (net.context_encoder, net.query_encoder):
            linear.weight.mul_(6)  # so that attention is far from even
    context = torch.from_numpy(contexts(64))
    with torch.inference_mode():
        assert torch.allclose(net(context), textbook_amn(net, context), atol=1e-6)
        even = torch.cat([context.mean(dim=1)] * 2, dim=1)
        without = normalize(context.mean(dim=1) + net.residual_net(even), dim=1)
        assert (net(context) - without).abs().max() > 1e-2  # and attention does matter here


def test_the_key_bias_of_amn_never_matters(tiny_net: TinyNet, contexts: Contexts) -> None:
    net = tiny_net("amn")
    context = torch.from_numpy(contexts(8))
    with torch.no_grad():
        before = net(context)
        net.context_encoder.bias.fill_(7)
        assert torch.allclose(net(context), before, atol=1e-6)
        assert torch.allclose(textbook_amn(net, context), before, atol=1e-5)


def test_an_untrained_amn_predicts_the_mean(contexts: Contexts) -> None:
    context = torch.from_numpy(contexts(8))
    with torch.inference_mode():
        answer = build("amn", {"dim": 16, "key_dim": 8, "hidden_dim": 16}).eval()(context)
    assert torch.allclose(answer, normalize(context.mean(dim=1), dim=1), atol=1e-6)


# GMN


def test_gmn_costs_no_more_than_amn() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in build(name, {}).parameters()) for name in ("amn", "gmn")}
    assert sizes["gmn"] <= sizes["amn"]


def test_the_mixtures_of_gmn_turn_with_the_space(tiny_net: TinyNet, contexts: Contexts) -> None:
    """Without the residual it depends only on inner products, so it is as good in any domain."""
    net: Any = tiny_net("gmn")
    with torch.no_grad():
        net.residual_net[-1].weight.zero_()
        net.residual_net[-1].bias.zero_()
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    context = torch.from_numpy(contexts(8))
    with torch.inference_mode():
        assert torch.allclose(net(context @ turn), net(context) @ turn, atol=1e-5)
        assert (net(context) - net(context.flip(1))).abs().max() > 1e-2  # and order matters


# The stacks


@pytest.mark.parametrize("architecture", ["gru", "lstm_stack"])
def test_an_untrained_stack_predicts_the_last_vector(contexts: Contexts, architecture: str) -> None:
    context = torch.from_numpy(contexts(8))
    net = build(architecture, {"dim": 16, "hidden_dim": 64, "blocks": 3}).eval()
    with torch.inference_mode():
        cosine = (net(context) * context[:, -1]).sum(dim=1)
    assert cosine.min() > 0.95  # a LayerNorm between stands in the way of 1


def test_a_block_is_the_norm_of_input_and_cell(tiny_net: TinyNet) -> None:
    block: Any = tiny_net("gru").blocks[0]
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(block(x), block.norm(x + block.gru(x)[0]), atol=1e-6)


def test_a_gru_in_steps_is_the_gru(tiny_net: TinyNet) -> None:
    """The exported form equals the trained one, also for the first step alone, which is computed differently."""
    gru: Any = tiny_net("gru").blocks[1].gru
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for length in (1, 2, 5):
            assert torch.allclose(gru_in_steps(gru, x[:, :length]), gru(x[:, :length])[0], atol=1e-6)


# The Transformer


def test_the_transformer_is_causal(tiny_net: TinyNet, contexts: Contexts) -> None:
    """The output at a position does not depend on later positions."""
    net: Any = tiny_net("transformer")
    context = torch.from_numpy(contexts(4))
    changed = context.clone()
    changed[:, 3:] = torch.from_numpy(contexts(4, seed=5))[:, 3:]
    seen: list[Tensor] = []
    net.transformer_decoder.register_forward_hook(lambda module, given, answer: seen.append(answer))
    with torch.inference_mode():
        net(context)
        net(changed)
    assert torch.allclose(seen[0][:, :3], seen[1][:, :3], atol=1e-6)
    assert (seen[0][:, 3:] - seen[1][:, 3:]).abs().min(dim=2).values.max() > 1e-4


def test_the_transformer_attends_to_its_input_as_memory(tiny_net: TinyNet, contexts: Contexts) -> None:
    net: Any = tiny_net("transformer")
    context = torch.from_numpy(contexts(4))
    mask = torch.full((5, 5), float("-inf")).triu(1)
    with torch.inference_mode():
        x = net.input_proj(context) + net.pos_encoder.pe[:, :5]
        states = x
        for layer in net.transformer_decoder.layers:
            states = layer(states, x, tgt_mask=mask, memory_mask=mask)
        assert torch.allclose(net(context), normalize(net.head(states[:, -1]), dim=1), atol=1e-5)


def test_positions_are_sinusoids(tiny_net: TinyNet) -> None:
    pe: Any = tiny_net("transformer").pos_encoder.pe
    assert pe.shape == (1, 20, 16)
    assert pe[0, 0].tolist() == [0.0, 1.0] * 8
    assert pe[0, 3, 4].item() == pytest.approx(np.sin(3 / 10000 ** (4 / 16)), abs=1e-6)
    assert pe[0, 3, 5].item() == pytest.approx(np.cos(3 / 10000 ** (4 / 16)), abs=1e-6)
