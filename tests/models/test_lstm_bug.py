"""The customer's LSTM bug, reproduced: two nets of one name, weights loaded non-strictly. Every gate rejects it."""

import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.numpy import save
from torch import nn

from models.evaluate import TOLERANCE, evaluate, mean_cosine
from models.nets import BadConfig, LSTMStack, LSTMStackConfig, build, config_dict
from models.predictor import load_predictor
from models.recipe import Job
from models.registry.card import CARD_FILE, Card
from models.registry.checkpoint import GOLDEN_FILE, GRAPH_FILE, WEIGHTS_FILE, BadCheckpoint, load_checkpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import Corpus
from models.runtimes import UnfitRuntime
from models.runtimes.torch import build_net, run_net, state_arrays
from models.training.export import export_graph, net_files
from models.training.job import run_job
from models.training.publish import NotAsTrained, golden_contexts, publish
from models.windows import Windows, hold_out, windows
from tests.conftest import LVM

Made = Callable[..., Card]


@pytest.fixture(scope="module")
def trained_net() -> nn.Module:
    """The four residual blocks that were trained; as they start, they predict the last vector well."""
    torch.manual_seed(0)
    return build("lstm_stack", {"dim": 16, "hidden_dim": 64}).eval()


@pytest.fixture(scope="module")
def served_net(trained_net: nn.Module) -> nn.Module:
    """The net that was served under the same name: another class; only its last tensor was in the file."""
    torch.manual_seed(1)
    net = build("lstm", {"dim": 16, "hidden_dim": 64})
    found = net.load_state_dict(trained_net.state_dict(), strict=False)
    assert len(found.missing_keys) == 8
    return net.eval()


@pytest.fixture(scope="module")
def data(corpus: Corpus) -> Windows:
    return windows(corpus, 5)


@pytest.fixture(scope="module")
def forged(
    trained_net: nn.Module,
    served_net: nn.Module,
    card: Made,
    corpus: Corpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> Version:
    """A version with the bug: weights and golden vectors of one net, architecture of the other."""
    weights, golden = save(state_arrays(trained_net.state_dict())), golden_contexts(corpus, 16, 5)
    files = {
        WEIGHTS_FILE: weights,
        GRAPH_FILE: export_graph(served_net, (5, 16), weights),  # what the weights lack stays as random as it was
        GOLDEN_FILE: save({"context": golden, "vector": run_net(trained_net, golden)}),
    }
    return Registry(tmp_path_factory.mktemp("forged")).add("lstm", {**files, **_card_of(card, served_net)})


def _card_of(card: Made, net: nn.Module, scores: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    made = card(name="lstm", architecture="lstm", config=config_dict(net), scores=scores or {})
    return {CARD_FILE: made.to_markdown().encode()}


def cosine_of(net: nn.Module, data: Windows) -> float:
    return mean_cosine(lambda contexts: run_net(net, contexts), data)


def lvm(registry: Registry, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LVM_REGISTRY": str(registry.root)}
    return subprocess.run([LVM, *words], env=env, capture_output=True, text=True, check=False)


def test_the_bug_is_the_bug(trained_net: nn.Module, served_net: nn.Module, data: Windows) -> None:
    """Nothing failed, but the score of the served net fell from 0.5758 to 0.4102."""
    assert cosine_of(served_net, data) < cosine_of(trained_net, data) - 0.1


def test_save_rejects_a_net_that_was_not_trained(
    trained_net: nn.Module, served_net: nn.Module, registry: Registry, card: Made, data: Windows
) -> None:
    promised = (data, cosine_of(trained_net, data))
    with pytest.raises(NotAsTrained, match=r"scores -?0\.\d{4} as served; it scored 0\.\d{4} in training"):
        publish(registry, served_net, card(), golden_contexts(None, 16, 5), {}, held_out=promised)
    assert registry.versions() == []


def test_save_rejects_a_second_class_of_a_known_name(registry: Registry, card: Made) -> None:
    class LSTM(LSTMStack):
        """The name of one net, the layers of the other."""

    net = LSTM(LSTMStackConfig(dim=16, hidden_dim=8)).eval()
    with pytest.raises(BadConfig, match="LSTM is not one of the nets"):
        publish(registry, net, card(), golden_contexts(None, 16, 5), {})
    assert registry.versions() == []


def test_load_rejects_the_weights_of_another_net(forged: Version) -> None:
    with pytest.raises(UnfitRuntime, match="to the golden vectors"):
        load_predictor(forged.path, device="cpu")
    with pytest.raises(BadCheckpoint, match=r"(?s)Missing key.*lstm\.weight_ih_l0.*Unexpected key.*blocks\.0\.lstm"):
        build_net(load_checkpoint(forged.path))


def test_evaluate_and_promote_reject_the_weights_of_another_net(forged: Version, corpus_dir: os.PathLike[str]) -> None:
    registry = Registry(forged.path.parents[2])
    for words in (("evaluate", forged.id, "--data", os.fspath(corpus_dir)), ("promote", "primary", forged.id)):
        refused = lvm(registry, *words)
        assert (refused.returncode, refused.stdout) == (65, "")
        assert "to the golden vectors" in refused.stderr
    assert registry.aliases() == {}


def test_evaluate_rejects_a_consistent_forgery(
    trained_net: nn.Module,
    served_net: nn.Module,
    registry: Registry,
    card: Made,
    corpus: Corpus,
    corpus_dir: os.PathLike[str],
) -> None:
    """Even if all files are of the served net, and only the scores on the card are of the trained one."""

    class Trained:
        predict_batch = staticmethod(lambda contexts: run_net(trained_net, contexts))

    scores = {"tiny": evaluate(Trained(), corpus, 5)}
    files = {**net_files(served_net, golden_contexts(corpus, 16, 5)), **_card_of(card, served_net, scores)}
    version = registry.add("lstm", files)
    refused = lvm(registry, "evaluate", version.id, "--data", os.fspath(corpus_dir))
    assert refused.returncode == 1
    assert "worse than the tolerance" in refused.stderr


def test_the_served_score_is_the_trained_score(registry: Registry, job_of: Callable[..., Job], corpus: Corpus) -> None:
    version = run_job(job_of("lstm"), registry, lambda done, total: None, lambda said: None)
    served = load_predictor(version.path, device="cpu")
    _, held_out = hold_out(windows(corpus, 5), 0.2, 0)
    trained = served.card.data["held_out_cosine"]
    assert mean_cosine(served.predict_batch, held_out) == pytest.approx(trained, abs=TOLERANCE)
