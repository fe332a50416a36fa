"""Imports nets of any architecture from ONNX files. They are tried in a process of their own, under limits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from models.registry.checkpoint import GOLDEN_FILE, GRAPH_FILE, ONNX_NET, WEIGHTS_FILE, BadCheckpoint
from models.runtimes.onnx import open_session
from models.training.imported import ImportedModel, ImportOptions
from models.training.onnx_graph import INPUT, OUTPUT
from models.training.onnx_trial import Request
from models.vectors import Floats

# of a trial
CPU_S = 60


class BadOnnx(BadCheckpoint):
    """An ONNX file that is no net which can be served; the message says why."""


def read_onnx(path: Path, options: ImportOptions, cpu_s: int = CPU_S) -> ImportedModel:
    """Return the net in an ONNX file: one float32 input `(B, T, D)`, one output `(B, D)`.

    The file is tried in a process of its own, which may take `cpu_s` seconds of CPU time.

    Raises:
        BadOnnx: the file is damaged, is no such net, or a trial of it failed; the message says what was found.
    """
    if options.architecture not in (None, ONNX_NET):
        raise BadOnnx(f"{path} is an ONNX file, whose net has no other name than {ONNX_NET}")
    with TemporaryDirectory() as directory:
        file, length = str(path.absolute()), options.context_length
        found = _try(Request(file, directory, length, options.dim, options.output, cpu_s))
        if "error" in found:
            raise BadOnnx(f"{path}: {found['error']}")
        graph, weights = ((Path(directory) / name).read_bytes() for name in (GRAPH_FILE, WEIGHTS_FILE))
    remarks = tuple(found.pop("remarks"))
    for remark in remarks:
        options.report(f"{path}: {remark}")
    facts = {"kind": "net", "architecture": ONNX_NET, **found}
    return ImportedModel(facts, partial(_files, graph, weights, found["config"]), limits=remarks)


def _files(graph: bytes, weights: bytes, config: Mapping[str, Any], golden: Floats) -> dict[str, bytes]:
    """Return the files of a net; the golden vectors are onnxruntime's answers to single contexts of `golden`."""
    session = open_session(graph, load_tensors(weights))
    rows = config["max_rows"] if config.get("fixed_rows") else 1
    batches = (np.repeat(context[None], rows, axis=0) for context in golden)
    answers = [session.run([OUTPUT], {INPUT: batch})[0][:1] for batch in batches]
    vectors = {"context": golden, "vector": np.concatenate(answers)}
    return {WEIGHTS_FILE: weights, GRAPH_FILE: graph, GOLDEN_FILE: save_tensors(vectors)}


def _try(request: Request) -> dict[str, Any]:
    command = [sys.executable, "-m", "models.training.onnx_trial", json.dumps(asdict(request))]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode == 0:
        found: dict[str, Any] = json.loads(process.stdout)
        return found
    if process.stderr.rstrip().endswith(os.strerror(errno.ENOSPC)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return {"error": f"a trial of it failed: {_reason(process.returncode, process.stderr, request)}"}


def _reason(status: int, stderr: str, request: Request) -> str:
    if status == -signal.SIGXCPU:
        return f"it did not end within {request.cpu_s} s of CPU time"
    if status < 0:
        return f"it ended with {signal.Signals(-status).name}; too little memory can be the cause"
    return (stderr.strip().splitlines() or [f"exit code {status}"])[-1][:500]
