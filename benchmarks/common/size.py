"""How large the work of a benchmark is: full, or small, to try it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """Device of a benchmark, and whether its work is small."""

    device: str = "cuda"
    """`cuda` or `cpu`."""
    small: bool = False
    """True for a trial with small sizes."""

    def sized(self, full: T, small: T) -> T:
        """Return the full size, or the small one in a trial."""
        return small if self.small else full
