"""torch, on any device that it supports; it is the reference that makes golden vectors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from models.nets import BadConfig, build
from models.nets.unit import unit
from models.registry.checkpoint import ONNX_NET, BadCheckpoint, Checkpoint
from models.runtimes.denormals import FlushedDenormals
from models.vectors import Floats


def best_device() -> str:
    """Return cuda or mps if torch can use one, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def build_net(checkpoint: Checkpoint) -> nn.Module:
    """Return the net of a checkpoint in eval mode, with every tensor loaded by name and none left over.

    Raises:
        BadCheckpoint: the architecture is unknown, or names or shapes do not match; the message lists them. Or the net
            came as an ONNX file.
    """
    card = checkpoint.card
    if card.architecture == ONNX_NET:
        raise BadCheckpoint(f"{checkpoint.version} came as an ONNX file: it has no torch module; onnxruntime runs it")
    try:
        net = build(card.architecture, card.config)
        state = {name: torch.from_numpy(array) for name, array in checkpoint.weights.items()}
        net.load_state_dict(state, strict=True)
    except (BadConfig, RuntimeError) as error:
        raise BadCheckpoint(f"{checkpoint.version}: {error}") from error
    return net.eval()


class InBfloat16(nn.Module):
    """A net that computes in bfloat16; contexts and answers stay float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.to(torch.bfloat16)

    def forward(self, context: Tensor) -> Tensor:
        """Map contexts `(B, T, D)` to unit next vectors `(B, D)`."""
        return unit(self.net(context.to(torch.bfloat16)).float())


def build_net_on(checkpoint: Checkpoint, device: str, precision: str) -> nn.Module:
    """Return the net of a checkpoint on `device`, in float32 or bf16; raises as `build_net`."""
    net = build_net(checkpoint).to(device)
    return net if precision == "float32" else InBfloat16(net)


def runtime_name(library: str, precision: str) -> str:
    """Return the name of a runtime: the library, and the precision if it is not float32."""
    return library if precision == "float32" else f"{library}-{precision}"


class TorchRuntime:
    """Eager torch on one device."""

    # except in benchmarks
    on_cpu = False
    sizes: tuple[int, ...] = ()

    def __init__(self, checkpoint: Checkpoint, device: str, precision: str = "float32") -> None:
        self.name = runtime_name("torch", precision)
        self._net = build_net_on(checkpoint, device, precision)
        self._device = device

    @torch.inference_mode()
    def run(self, contexts: Floats) -> Floats:
        """Map float32 contexts `(B, T, D)` to float32 unit vectors `(B, D)`."""
        with FlushedDenormals():
            answer: Floats = self._net(torch.from_numpy(contexts).to(self._device)).cpu().numpy()
        return answer


def run_net(net: nn.Module, contexts: Floats) -> Floats:
    """Return the answers of a float32 net to contexts `(B, T, D)`, computed on the CPU."""
    with torch.inference_mode(), FlushedDenormals():
        return np.asarray(net.cpu().eval()(torch.from_numpy(contexts)).numpy(), dtype=np.float32)


def state_arrays(state: Mapping[str, torch.Tensor]) -> dict[str, Floats]:
    """Return the float32 arrays of a state dictionary."""
    return {name: np.asarray(tensor.detach().cpu().float().numpy()) for name, tensor in state.items()}
