"""Times the bundled text encoder in float32 and in bf16, on chunks of the shipped corpus, and compares the vectors.

`python -m bench.text` prints JSON. Times are of the processor, so that other work on the machine changes them little.
"""

from __future__ import annotations

import json
from time import process_time

import numpy as np

from bench.options import ROOT
from models.retrieval.corpus import read_corpus
from models.text.encoder import MiniLM

CHUNKS = 1024
QUERIES = ("Who built the first steam locomotive?", "Do hares dig burrows?")
ROUNDS = 3


def main() -> None:
    """Measure and print."""
    corpus = read_corpus((ROOT / "artifacts" / "lvm" / "retriever").resolve())
    texts = [str(corpus.chunk(row).text) for row in np.linspace(0, len(corpus) - 1, CHUNKS).astype(int)]
    encoders = {"float32": MiniLM(1), "bf16": MiniLM(1, may_use_bf16=True)}
    vectors = {name: encoder.encode(texts) for name, encoder in encoders.items()}
    cosines = np.vecdot(vectors["float32"], vectors["bf16"])
    figures = {
        "uses_bf16": encoders["bf16"].uses_bf16,
        "cosine": {"worst": float(cosines.min()), "mean": float(cosines.mean())},
        "ms_per_chunk": _interleaved(encoders, texts[:: CHUNKS // 256]),
        "ms_per_query": {query: _interleaved(encoders, [query]) for query in QUERIES},
    }
    print(json.dumps(figures, indent=2))


def _interleaved(encoders: dict[str, MiniLM], texts: list[str]) -> dict[str, float]:
    """Return the least milliseconds of the processor for a text, by encoder."""
    found: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(ROUNDS):
        for name, encoder in encoders.items():
            began = process_time()
            encoder.encode(texts)
            found[name].append((process_time() - began) / len(texts) * 1000)
    return {name: round(min(times), 2) for name, times in found.items()}


if __name__ == "__main__":
    main()
