"""The data sets of a training run as one, mapped from disk: their text is not read, and vectors only when needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.retrieval.corpus import BadCorpus, map_vectors
from models.vectors import StoredVectors
from models.windows import StoredCorpus, check_dim


def map_training_sets(directories: Sequence[Path]) -> StoredCorpus:
    """Return the chunks of all `directories`, in this order. Articles get new ids, so that no two have the same.

    Raises:
        BadCorpus: a directory is given twice, or has no vectors that can be read.
        OtherDimension: the vectors of two directories differ in D.
    """
    if len({path.resolve() for path in directories}) < len(directories):
        raise BadCorpus(f"the same directory is given twice: {', '.join(map(str, directories))}")
    parts = [map_vectors(path) for path in directories]
    for path, part in zip(directories, parts, strict=True):
        check_dim(str(path), part.dim, parts[0].dim)
    articles, count = [], 0
    for part in parts:
        found, numbers = np.unique(part.article, return_inverse=True)
        articles.append(count + numbers)
        count += len(found)
    position = np.concatenate([part.position for part in parts])
    return StoredCorpus(
        StoredVectors([part.halves for part in parts]), np.concatenate(articles, dtype=np.int32), position
    )
