"""The nets of `lvm bench`: untrained and seeded, published as versions once and kept."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.options import LENGTH
from models.nets import build
from models.registry.card import Card
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry, Version
from models.runtimes.torch import build_net
from models.training import publish
from models.training.work_cache import source_digest
from models.vectors import Floats, normalise

NETS = ("amn", "gru", "lstm", "transformer")


def registry_of(out: Path, dim: int, nets: Sequence[str] = NETS) -> Registry:
    """Return a registry of `nets` at D = `dim`, the first as primary, the second as fallback; made if it is missing."""
    registry = Registry(out / f"registry-{dim}-{source_digest()[:8]}")
    for stale in set(out.glob(f"registry-{dim}-*")) - {registry.root}:
        shutil.rmtree(stale)
    known = by_name(registry)
    for name in nets:
        if name not in known:
            print(f"bench: exporting {name} at D = {dim}", file=sys.stderr, flush=True)
            publish.publish(registry, seeded(name, dim), _card(name, dim), draw_contexts(publish.GOLDEN, dim), {})
    for alias, name in zip(("primary", "fallback"), nets, strict=False):
        if alias not in registry.aliases():
            registry.point(alias, by_name(registry)[name], why="to be measured")
    return registry


def by_name(registry: Registry) -> Mapping[str, Version]:
    """Return the version of every net."""
    return {version.name: version for version in registry.versions()}


def seeded(name: str, dim: int) -> nn.Module:
    """Return a net without zero weights; new nets have some, which take less time."""
    torch.manual_seed(0)
    return with_noise(build(name, {"dim": dim, "context_length": LENGTH}), 0.02)


def with_noise(net: nn.Module, scale: float) -> nn.Module:
    """Add normal noise to every weight of a net and return it."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return net.eval()


def draw_contexts(count: int, dim: int, seed: int = 0) -> Floats:
    """Return contexts `(count, T, dim)` of unit vectors that resemble their neighbours."""
    noise = np.random.default_rng(seed).standard_normal((count, LENGTH, dim))
    return normalise(noise + noise.mean(axis=1, keepdims=True))


def _card(name: str, dim: int) -> Card:
    return Card(
        name=name,
        kind="net",
        dim=dim,
        encoder="none",
        license="apache-2.0",
        attribution="",
        command="lvm bench",
        limits=("Untrained: for measuring speed only.",),
    )


def second_version(registry: Registry, version: Version) -> Version:
    """Add a version of a net with a little noise in its weights, to be swapped with it; return it."""
    known = load_checkpoint(version.path)
    torch.manual_seed(0)
    net = with_noise(build_net(known), 0.001)
    card = replace(known.card, scores={}, limits=("Weights with noise: only to be swapped with the real ones.",))
    return publish.publish(registry, net, card, known.golden_context, {})
