"""Print how many threads a library works in. Arguments: one of WORK, the directory of a version of a net."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

from models.cores import cores, pool_limits

os.environ |= {"OPENBLAS_NUM_THREADS": "1", **pool_limits(cores())}

import numpy as np

from models.registry.checkpoint import load_checkpoint

Work = Callable[[], Any]
LOOK_S = 0.3


def faiss(_: Path) -> Work:
    library = importlib.import_module("faiss")
    index = library.IndexFlatIP(64)
    index.add(np.ones((20_000, 64), np.float32))
    return lambda: index.search(np.ones((256, 64), np.float32), 10)


def tokenizers(_: Path) -> Work:
    library = importlib.import_module("tokenizers")
    tokenizer = library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return lambda: tokenizer.encode_batch(["a b c " * 100] * 64)


def numpy(_: Path) -> Work:
    square = np.ones((512, 512), np.float32)
    return lambda: square @ square


def onnx(version: Path) -> Work:
    return _run(importlib.import_module("models.runtimes.onnx").OnnxRuntime, version, cores())


def openvino(version: Path) -> Work:
    return _run(importlib.import_module("models.runtimes.openvino").OpenVinoRuntime, version, "int8", cores())


def _run(runtime: Callable[..., Any], version: Path, *arguments: Any) -> Work:
    checkpoint = load_checkpoint(version)
    opened = runtime(checkpoint, *arguments)
    contexts = np.repeat(checkpoint.golden_context, 128, axis=0)[:128]
    return lambda: opened.run(contexts)


WORK = {"faiss": faiss, "tokenizers": tokenizers, "numpy": numpy, "onnxruntime": onnx, "openvino": openvino}


def busy_threads(work: Work) -> int:
    """Return how many threads did more than a tenth of the work of some time."""
    work()
    before, end = _spent_s(), process_time() + LOOK_S
    while process_time() < end:
        work()
    return sum(spent - before.get(thread, 0) > LOOK_S / 10 for thread, spent in _spent_s().items())


def _spent_s() -> dict[str, float]:
    tasks = Path("/proc/self/task").iterdir()
    return {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}


if __name__ == "__main__":
    print(busy_threads(WORK[sys.argv[1]](Path(sys.argv[2]))))
