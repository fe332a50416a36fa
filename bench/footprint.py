"""What loading a version costs a process: `python -m bench.footprint DIRECTORY LIBRARY DEVICE THREADS PRECISION`."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from time import perf_counter

import onnxruntime
import torch

from bench.machine import rss_mb
from bench.nets import RunMode
from models.registry.checkpoint import load_checkpoint

REPEATS = 3


def main(directory: Path, mode: RunMode) -> dict[str, float]:
    """Return seconds to load (read, verify, open) and the megabytes grown after queries, without the libraries."""
    # Load the libraries first, so that they do not count.
    onnxruntime.get_available_providers()
    if mode.library == "openvino":
        import models.runtimes.openvino  # noqa: F401
    if mode.device != "cpu":
        torch.zeros(1, device=mode.device)
    before = rss_mb(os.getpid())
    began = perf_counter()
    checkpoint = load_checkpoint(directory)
    runtime = mode.open(checkpoint)
    load_s = perf_counter() - began
    for _ in range(REPEATS):
        runtime.run(checkpoint.golden_context[:1])
    gc.collect()
    return {"load_s": load_s, "grown_mb": rss_mb(os.getpid()) - before}


if __name__ == "__main__":
    _, path, library, device, threads, precision = sys.argv
    print(json.dumps(main(Path(path), RunMode(library, device, int(threads), precision))))
