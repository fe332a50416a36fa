"""`python -m tests.faults.reader KIND FILES OUT SEED COUNT`: read COUNT spoiled copies of FILES, in a process apart.

KIND is `net`, `corpus` or `foreign`. Prints, as JSON, how many were refused or found unharmed, by what was done to
them. Any exception but the one that refuses, and any program or listener started, ends it; a crash of a library, too.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

import numpy as np

from models.predictor import load_predictor
from models.registry import manifest
from models.registry.checkpoint import BadCheckpoint
from models.retrieval.retriever import Search, load_retriever
from models.runtimes import MIN_PARITY
from tests.faults.versions import corrupted, write_version

RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.bind", "os.symlink")


def read_net(directory: Path) -> None:
    """Load a net and hold its answers to what it must have been held to already."""
    net = load_predictor(directory, device="cpu")
    answers = net.predict_batch(net._golden)
    assert answers.shape == (len(net._golden), net.card.dim)
    assert (np.abs(np.linalg.norm(answers, axis=1) - 1) < 2 - 2 * MIN_PARITY).all()


def read_corpus(directory: Path) -> None:
    """Load a corpus and search it."""
    corpus = load_retriever(directory)
    corpus.warm_up()
    query = np.zeros((corpus.dim,), np.float32)
    hits = corpus.search_batch([Search(query + 1, 5)])[0]
    assert all(np.isfinite(hit.score) for hit in hits)


def read_foreign(directory: Path) -> None:
    """Read a customer's checkpoint."""
    from models.training.torch_import import read_net as read

    read(directory / "checkpoint.pt", "amn")


def listen_in() -> None:
    """End the process at the first thing that is run."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in RUNS:
            raise SystemExit(f"{event} {arguments!r}")

    sys.addaudithook(hook)


def main(read: Callable[[Path], None], files: dict[str, bytes], out: Path, random: Random, count: int) -> Counter[str]:
    """Return how many copies were refused, or read in full, by what was done to one file of each."""
    found: Counter[str] = Counter()
    for _ in range(count):
        name = random.choice(sorted(files))
        way, data = corrupted(random, files[name])
        write_version(out, {**files, name: data})
        try:
            read(out)
            found[f"{way} in {name}: harmless"] += 1
        except BadCheckpoint:
            found[f"{way} in {name}: refused"] += 1
        except Exception as error:
            found[f"{way} in {name}: {type(error).__name__} {str(error)[:200]}"] += 1
        rmtree(out)
    return found


if __name__ == "__main__":
    kind, source, target, seed, number = sys.argv[1:]
    given = {path.name: path.read_bytes() for path in Path(source).iterdir() if path.name != manifest.CHECKSUMS_FILE}
    reader = {"net": read_net, "corpus": read_corpus, "foreign": read_foreign}[kind]
    listen_in()
    print(json.dumps(main(reader, given, Path(target), Random(int(seed)), int(number))))
