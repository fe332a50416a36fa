"""The contexts that requests carry: `contexts.npy`, float16 (64, 5, 384), real neighbouring chunks.

Made once by `python -m loadtest.contexts artifacts/lvm/retriever`: 64 articles evenly spread over the set,
one window of five consecutive chunks at a seeded place in each. The vectors are all-MiniLM-L6-v2 embeddings
of English Wikipedia text (dump of July 2019, Wikipedia contributors) and stay under CC BY-SA 3.0.
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.plan import PlanError

Vectors = npt.NDArray[np.float32]

SHIPPED = Path(__file__).with_name("contexts.npy")


def load(path: Path = SHIPPED) -> Vectors:
    """Read contexts as float32 (N, T, D); float16 files are L2-normalised again after the cast."""
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: {error}") from error
    if stored.ndim != 3 or 0 in stored.shape or stored.dtype.kind != "f":
        raise PlanError(f"{path}: contexts are floats of shape (N, T, D), not {stored.dtype} {stored.shape}")
    contexts = stored.astype("<f4")
    if stored.dtype == np.float16:
        contexts /= np.linalg.norm(contexts, axis=-1, keepdims=True)
    return np.ascontiguousarray(contexts)


def sample(directory: Path, count: int = 64, length: int = 5, seed: int = 0) -> npt.NDArray[np.float16]:
    """Pick `count` windows of `length` chunks from a set (see its README), each from another article."""
    vectors = np.load(directory / "vectors.f16.npy", mmap_mode="r")
    articles = np.load(directory / "index.npy")[:, 0]
    names, first, chunks = np.unique(articles, return_index=True, return_counts=True)
    long_enough = np.flatnonzero(chunks >= length)
    if len(long_enough) < count:
        raise PlanError(f"{directory}: only {len(long_enough)} of {len(names)} articles are long enough")
    chosen = long_enough[np.linspace(0, len(long_enough) - 1, count).astype(int)]
    starts = first[chosen] + np.random.default_rng(seed).integers(0, chunks[chosen] - length + 1)
    return np.stack([vectors[start : start + length] for start in starts]).astype(np.float16)


if __name__ == "__main__":
    np.save(SHIPPED, sample(Path(sys.argv[1])))
