"""CUDA: one graph per padded batch size, captured before the first caller, replayed with one launch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from models.registry.checkpoint import Checkpoint
from models.runtimes.torch import build_net_on, runtime_name
from models.vectors import Floats

# rows of the largest graph; more rows run in several steps
MAX_GRAPH_ROWS = 1024
# runs before a capture, in which libraries allocate memory and choose kernels
WARM_UP_RUNS = 3

Step = Callable[[Floats], Floats]


class GraphRuntime:
    """Runs up to `MAX_GRAPH_ROWS` rows, padded to the next power of two, by the step that `capture(size)` returns.

    A step maps `n <= size` contexts to n answers. It is captured when its size is first needed, which is in warm-up:
    warm-up runs every power of two up to the largest batch.
    """

    on_cpu = False
    sizes: tuple[int, ...] = ()

    def __init__(self, name: str, capture: Callable[[int], Step]) -> None:
        self.name = name
        self._capture = capture
        self._steps: dict[int, Step] = {}

    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        if len(contexts) <= MAX_GRAPH_ROWS:
            return self._step(len(contexts))(contexts)
        parts = (contexts[at : at + MAX_GRAPH_ROWS] for at in range(0, len(contexts), MAX_GRAPH_ROWS))
        return np.concatenate([self._step(len(part))(part) for part in parts])

    def _step(self, rows: int) -> Step:
        size = 1 << (rows - 1).bit_length()
        if size not in self._steps:
            self._steps[size] = self._capture(size)
        return self._steps[size]


def open_cuda(checkpoint: Checkpoint, precision: str) -> GraphRuntime:
    """Return the net on the GPU; `precision` is float32 or bf16."""
    # TF32 rounds float32 to 10 bits in recurrent nets
    torch.backends.cudnn.allow_tf32 = False
    net = build_net_on(checkpoint, "cuda", precision)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    shape = checkpoint.golden_context.shape[1:]
    return GraphRuntime(runtime_name("cuda-graphs", precision), lambda size: CapturedNet(net, size, shape, stream))


class CapturedNet:
    """One captured graph with fixed buffers for `size` contexts on the device, and pinned buffers on the host."""

    @torch.inference_mode()
    def __init__(self, net: nn.Module, size: int, shape: tuple[int, ...], stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._graph = torch.cuda.CUDAGraph()
        self._given_here = torch.zeros(size, *shape, pin_memory=True)
        with torch.cuda.stream(stream):
            self._given = torch.zeros(size, *shape, device="cuda")
            for _ in range(WARM_UP_RUNS):
                net(self._given)
        stream.synchronize()
        # thread_local: another thread may serve the version that this one replaces.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._answer = net(self._given)
        self._answer_here = torch.zeros(self._answer.shape, pin_memory=True)

    @torch.inference_mode()
    def __call__(self, contexts: Floats) -> Floats:
        """Map `n <= size` contexts `(n, T, D)` to unit vectors `(n, D)`; the other rows keep their old values."""
        rows = len(contexts)
        self._given_here[:rows].numpy()[:] = contexts
        with torch.cuda.stream(self._stream):
            self._given[:rows].copy_(self._given_here[:rows], non_blocking=True)
            self._graph.replay()
            self._answer_here[:rows].copy_(self._answer[:rows], non_blocking=True)
        self._stream.synchronize()
        answer: Floats = self._answer_here[:rows].numpy().copy()
        return answer
