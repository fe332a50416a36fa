"""The gate before a real, running server: each bad version is refused for its own reason, and nobody notices."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import torch

from models.nets import build, config_dict
from models.registry.card import CARD_FILE, Card, read_card
from models.registry.checkpoint import WEIGHTS_FILE, load_checkpoint
from models.registry.registry import Registry, Version
from models.retrieval.corpus import read_corpus, write_corpus
from models.runtimes.torch import build_net
from models.training import publish
from models.training.export import net_files
from models.vectors import normalise
from tests.conftest import LVM, PATIENCE_S, Process, until
from tests.fakes import octets_of

WIDER = 32  # times the keys: 8.4 times the work of the whole net


def files_of(version: Version) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in version.path.iterdir() if path.name != "SHA256SUMS"}


def proud(registry: Registry) -> Version:
    """The primary, but its card claims 0.02 more."""
    files = files_of(registry.resolve("primary"))
    card = Card.from_markdown(files[CARD_FILE].decode())
    score = card.scores["wiki/val"]
    scores = {**card.scores, "wiki/val": {**score, "cosine": score["cosine"] + 0.02}}
    return registry.add("amn", {**files, CARD_FILE: replace(card, scores=scores).to_markdown().encode()})


def flipped(registry: Registry) -> Version:
    """GMN, one bit of whose weights is another."""
    version = next(version for version in registry.versions() if version.name == "gmn")
    weights = version.path / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return version


def small(registry: Registry, data: Path) -> Version:
    """A sound net of D = 16, scored on the corpus that is made in `data`."""
    vectors = normalise(np.random.default_rng(0).standard_normal((24, 16)))
    write_corpus(data, vectors, [{"article_id": 1, "title": "One", "chunks": ["text"] * 24}])
    corpus = read_corpus(data)
    card = replace(
        read_card(registry.resolve("primary").path), name="small", scores={}, reference=publish.reference_of(corpus)
    )
    net = build("amn", {"dim": 16, "key_dim": 8, "hidden_dim": 16}).eval()
    return publish.publish(registry, net, card, publish.golden_contexts(corpus, 16, 5), {"small": corpus})


def slow(registry: Registry) -> Version:
    """A net that answers as the primary does, with many keys that say nothing."""
    known = load_checkpoint(registry.resolve("primary").path)
    narrow = build_net(known)
    config = config_dict(narrow)
    net = build("amn", {**config, "key_dim": WIDER * config["key_dim"]}).eval()
    state = {name: padded(tensor, net.state_dict()[name].shape) for name, tensor in narrow.state_dict().items()}
    for name in ("query_encoder.weight", "query_encoder.bias"):
        state[name] *= WIDER**0.5  # the net divides by the root of the count of keys
    net.load_state_dict(state)
    card = replace(known.card, **publish.facts(net))
    files = net_files(net, known.golden_context)
    return registry.add("amn", {**files, CARD_FILE: card.to_markdown().encode()})


def padded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    wide = torch.zeros(shape)
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


def promote(registry: Registry, version: Version, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LVM_REGISTRY": str(registry.root)}
    command = [LVM, "promote", "primary", version.id, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_bad_versions_are_refused_each_for_its_own_reason_and_the_server_answers_as_before(
    process: Callable[..., Process], tmp_path: Path
) -> None:
    """Claims 0.02 too much; a bit flipped; of another D; three times slower and more: exit 65, nothing moves."""
    server = process(LVM_RELOAD_S="0.05")
    registry, data = server.registry, tmp_path / "small"
    ledger = (registry.root / "ledger.jsonl").read_bytes()
    before, aliases, live = answers(server), registry.aliases(), server.events("version live")
    cases = [
        (
            proud(registry),
            (),
            "its card says 0.6097: +0.0200, allowed difference: 0.001",
        ),
        (flipped(registry), (), "weights.safetensors was altered"),
        (small(registry, data), ("--data", f"small={data}"), "has D = 16, T = 5, encoder = all-MiniLM-L6-v2; "),
        (slow(registry), (), "times as long, tolerated: 2; "),
    ]
    for version, words, reason in cases:
        refused = promote(registry, version, *words)
        assert (refused.returncode, refused.stdout) == (65, ""), refused.stderr
        others = [other for _, _, other in cases if other != reason]
        assert reason in refused.stderr
        assert not any(other in refused.stderr for other in others), refused.stderr
        assert answers(server) == before
    assert registry.aliases() == aliases
    assert (registry.root / "ledger.jsonl").read_bytes() == ledger
    assert server.events("version live") == live


def test_an_alias_that_moves_while_a_version_is_judged_is_left_where_it_is(shipped: Path) -> None:
    """The judge waits for the weights, on which there is a lease, until somebody else was quicker: exit 75."""
    registry = Registry(shipped)
    version = next(version for version in registry.versions() if version.name == "gmn")
    env = {**os.environ, "LVM_REGISTRY": str(shipped)}
    with leased(version.path / WEIGHTS_FILE) as is_wanted:
        judge = subprocess.Popen([LVM, "promote", "primary", version.id], env=env, stderr=subprocess.PIPE, text=True)
        until(lambda: judge.poll() is not None or is_wanted.is_set(), "the judge to ask for weights")
        quicker = registry.point("primary", registry.resolve("fallback"))
    assert "another process moved this alias meanwhile; run `lvm promote` again\n" in judge.communicate()[1]
    assert judge.returncode == 75
    assert registry.aliases()["primary"] == quicker.after
    assert registry.ledger()[-1] == quicker


@contextmanager
def leased(path: Path) -> Iterator[threading.Event]:
    """Have whoever opens a file wait meanwhile; yields what is set once somebody does."""
    is_wanted = threading.Event()
    before = signal.signal(signal.SIGIO, lambda *_: is_wanted.set())
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield is_wanted
    finally:
        os.close(file)
        signal.signal(signal.SIGIO, before)


def answers(server: Process) -> list[tuple[str, bytes]]:
    """Return who answers the golden contexts of the primary, and what."""
    golden = load_checkpoint(server.registry.resolve("primary").path).golden_context
    headers = {**octets_of(golden), "accept": "application/octet-stream"}
    found = []
    for alias in ("primary", "fallback"):
        params = {"model": alias}
        answer = httpx.post(
            f"{server.url}/predict", content=golden.tobytes(), params=params, headers=headers, timeout=PATIENCE_S
        )
        found.append((answer.headers["x-model-version"], answer.content))
    return found
