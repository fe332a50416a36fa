"""The payload tower of a two-tower: makes of a passage's vector the one that queries search. No torch."""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from models.registry.checkpoint import BadCheckpoint
from models.vectors import Floats, normalise

# as torch's LayerNorm
_EPSILON = 1e-5
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: erf to 1.5e-7, the precision of float32
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_SCALE = 0.3275911
# the layers of the MLP, as `nn.Sequential` numbers them: linear, GELU, layer norm, linear
_FIRST, _NORM, _LAST = "0", "2", "3"


class PayloadTower:
    """The passage tower of D = `dim` in the bytes of a safetensors file, as `models.nets.two_tower` trains it.

    Tensors called `net.*` are a residual MLP; tensors called `mlp.*` one whose answer is not added to the vector.

    Raises:
        BadCheckpoint: the file is unreadable, or its tensors are not those of a tower of this D.
    """

    def __init__(self, data: bytes, dim: int) -> None:
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise BadCheckpoint(f"payload tower: {error}") from error
        self._is_residual = not any(name.startswith("mlp.") for name in tensors)
        prefix = "net" if self._is_residual else "mlp"
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{layer}.bias": (dim,) for layer in (_FIRST, _NORM, _LAST)}
        shapes |= {f"{prefix}.{_FIRST}.weight": (dim, dim), f"{prefix}.{_NORM}.weight": (dim,)}
        shapes |= {f"{prefix}.{_LAST}.weight": (dim, dim)}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != shapes:
            raise BadCheckpoint(f"payload tower: tensors have shapes {found}; expected {shapes}")
        self._tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}

    def run(self, vectors: Floats) -> Floats:
        """Map unit vectors of passages `(N, D)` to unit vectors `(N, D)`, float32."""
        hidden = _normalised(_gelu(self._linear(_FIRST, vectors)))
        answer = self._linear(_LAST, hidden * self._tensors[f"{_NORM}.weight"] + self._tensors[f"{_NORM}.bias"])
        return normalise(vectors + answer if self._is_residual else answer)

    def _linear(self, layer: str, inputs: Floats) -> Floats:
        weight: Floats = self._tensors[f"{layer}.weight"]
        return np.asarray(inputs @ weight.T + self._tensors[f"{layer}.bias"], np.float32)


def _normalised(rows: Floats) -> Floats:
    """Return rows `(N, D)` with mean 0 and variance 1."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    variance = np.square(centred).mean(axis=1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + _EPSILON), np.float32)


def _gelu(x: Floats) -> Floats:
    return np.asarray(x * (1 + _erf(x * np.float32(np.sqrt(0.5)))) / 2, np.float32)


def _erf(x: Floats) -> Floats:
    t = 1 / (1 + np.float32(_ERF_SCALE) * np.abs(x))
    erf = 1 - t * np.polyval(np.array(_ERF, np.float32), t) * np.exp(-x * x)
    return np.asarray(np.copysign(erf, x), np.float32)
