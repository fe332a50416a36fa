"""Every command and program of the documents is run beside one live service, and does what the document shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.retrieval.corpus import read_corpus, write_corpus
from tests.conftest import ROOT, SHIPPED, Process
from tests.docs import blocks
from tests.docs.blocks import Block
from tests.docs.clone import URL, Clone

DOCUMENTS = [*sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "README.md"]
CALLS = "127.0.0.1:8001"
NOT_RUN: Mapping[str, str] = {  # the beginning of a command, and why it cannot run here
    "git clone": "the directory looks like a clone",
    "make serve": "installs; what it starts is what all others talk to",
    "lvm leaderboard": "times every net for minutes; tests/bench/test_leaderboard.py runs it on tiny ones",
    "lvm bench": "times nets and servers for twenty minutes; tests/bench measures tiny ones",
    "lvm train gmn --two-tower": "hours, on the training set; tests/models/training trains tiny towers",
    "lvm train reranker": "the same",
    "lvm train gmn --used": "the same",
    "python -m bench.learning_curve": "reads versions that take hours to make; tests/bench/test_learning_curve.py",
    "lvm corpus wiki-val": "the same",
    "lvm overlap": "fails: the articles of the examples are in both; tests/lvm/test_cli.py runs it",
    "python -m bench.capacity": "minutes, on two quiet cores; tests/bench/capacity tests its parts",
    "docker build": "wants an engine; make image-check builds the image without one",
    "kubectl": "wants a cluster; tests/docker/test_kubernetes.py holds the files to their schemas",
    "printf 'prometheus:": "makes the secret that the next one takes",
    "helm": "wants a cluster",
    "pip install -c constraints.txt -e '.[milvus]'": "installs",
    "pip install -c constraints.txt -e '.[grpc]'": "installs",
    "LVM_GRPC_PORT=8001 lvm serve": "the service beside has it set",
    "LVM_MILVUS_URI=": "wants a Milvus; tests/e2e/test_milvus.py has one",
    "lvm index push": "the same",
    "lvm serve --ray": "wants the ray extra; make ray-check starts one",
    "LVM_REGISTRY=/srv/": "wants registries and ports; the service beside has LVM_COMPAT set",
    "ray start": "the same",
    "serve run": "the same",
}
EXITS: Mapping[str, int] = {  # commands that show how something ends otherwise than well
    "LVM_REGISTRY=artifacts/lvm python3 -m models.registry rollback primary": 1,
}
PRELUDE = """set -euo pipefail
lvm() { command lvm "$@"; case $1 in promote|rollback) ./until_served;; esac; }
curl() { case $1 in -*f*) command curl "$@";; *) command curl --fail-with-body "$@";; esac; }
"""


class Site(Clone):
    """A clone with data to work on, and a service that serves its registry."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        registry = root / "artifacts/lvm"
        self._add_data(registry / "retriever")
        self.process = Process(
            registry, root / "serve.log", LVM_TIMEOUT_MS="60000", LVM_COMPAT="lnsp", LVM_GRPC_PORT="0"
        )
        self.addresses |= {URL: self.process.url, CALLS: self.process.events("listening")[0]["grpc"]}
        self.environment["LVM_URL"] = self.process.url

    def _add_data(self, shipped: Path) -> None:
        """Make what a person brings: articles, two data sets that the documents call DIR and my-val, a checkpoint."""
        whole = read_corpus(shipped)
        articles = [dict(whole.articles[article]) for article, _ in groupby(whole.article.tolist())][:8]
        for name in ("DIR", "my-val"):
            write_corpus(self.root / name, whole.vectors[: sum(len(each["chunks"]) for each in articles)], articles)
        lines = [{"title": each["title"], "chunks": each["chunks"][:7]} for each in articles[:4]]
        (self.root / "articles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        weights = load_file(SHIPPED / "primary/weights.safetensors")
        torch.save({"model_state_dict": weights}, self.root / "epoch_20.pt")

    def run_block(self, block: Block) -> None:
        """Run the commands of a block, but for those that cannot run here."""
        expected = next((status for line, status in EXITS.items() if line in block.text), 0)
        self.run(block, NOT_RUN, expected, PRELUDE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.process.stop()


@pytest.mark.parametrize(
    "document", [each for each in DOCUMENTS if blocks.FENCE.search(each.read_text())], ids=lambda each: each.name
)
def test_what_a_document_shows_is_what_happens(
    site: Site, document: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.root)
    session: dict[str, Any] = {}
    for block in blocks.read(document):
        if block.language == "sh":
            site.run_block(block)
        elif block.language == "python":
            site.execute(block, session, capsys)


def test_what_is_not_run_stands_in_some_document() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    for command in (*NOT_RUN, *EXITS):
        assert f"\n{command}" in text, command


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ('{"a": ..., "b": 1}', {"a": [2], "b": 1}),
        ('{"a": [1, ... 3 in all], ...}', {"a": [1, 2, 3], "c": None}),
        ("[... 2 in all]", [1, 2]),
        ('{"a": "so far...", "b": [{"c": 0.5}, ...]}', {"a": "so far so good", "b": [{"c": 0.50001}]}),
    ],
)
def test_an_answer_is_what_is_shown(shown: str, found: Any) -> None:
    assert blocks.fault(blocks.parse(shown), found) is None


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ('{"a": 1}', {"a": 1, "b": 2}),
        ('{"a": 1, "b": ...}', {"a": 1}),
        ("[1, ... 3 in all]", [1, 2]),
        ("[1, 2]", [1, 2, 3]),
        ('{"a": null}', {"a": 0}),
        ('{"a": "so far..."}', {"a": "not so"}),
        ("0.5", 0.6),
    ],
)
def test_another_answer_is_not(shown: str, found: Any) -> None:
    assert blocks.fault(blocks.parse(shown), found) is not None
