"""How long to measure, how often, at which size, and where the report goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "artifacts" / "lvm"
LENGTH = 5  # T, of every net here


@dataclass(frozen=True)
class Plan:
    """`seconds` of one measurement, `rounds` of each, D of the nets, and the directory to write to."""

    seconds: float
    rounds: int
    dim: int
    out: Path
