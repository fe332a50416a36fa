"""Where things are, and how `lvm bench` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "artifacts" / "lvm"
# T, the context length of every net that is measured.
LENGTH = 5


@dataclass(frozen=True)
class BenchOptions:
    """Seconds of one measurement, rounds of each, D of the nets, and the directory to write to."""

    seconds: float
    rounds: int
    dim: int
    out: Path
