"""What a recorder notes while a model runs: saved tensors, calls of layers, and their times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from yolov12.mas.memory.reading import Stopwatch

__all__ = ["Call", "Peaks", "Saved", "Timer", "WholePasses"]


class Peaks(Protocol):
    """The part of a meter that reads peaks; see `Meter`. `ByteTrace` has it, too."""

    def mark(self) -> int:
        """Reset the peak; return the bytes allocated now."""

    def peak_bytes(self) -> int:
        """Return the highest allocated bytes since the last mark."""


@dataclass(frozen=True)
class WholePasses:
    """Milliseconds of a forward and backward pass without an observer, under three plans."""

    keep_ms: float
    """Time with everything kept."""
    rebuild_ms: float
    """Time with all flexible layers rebuilt."""
    recompute_ms: float
    """Time with all flexible layers recomputed."""


@dataclass
class Saved:
    """A tensor that autograd saves for the backward pass."""

    bytes: int
    """Size of the tensor's storage."""
    layers: tuple[str, ...]
    """Layers that were running when the tensor was first saved, outermost first."""
    tensor: Tensor | None
    """Keeps the memory allocated during the pass, so that the address stays unique."""


@dataclass(frozen=True)
class Timer:
    """Times of one call of a layer."""

    host_ms: float
    """Time in which the host launched the layer, in milliseconds."""
    watch: Stopwatch
    """Stopwatch of the device."""


@dataclass
class Call:
    """Storages and tensors of one call of a layer."""

    inputs: dict[int, int]
    """Address of the storage → bytes. `outputs` has the same form."""
    outputs: dict[int, int] = field(default_factory=dict)
    given: list[tuple[Tensor, int]] = field(default_factory=list)
    """Input tensors and their versions at the time of the call."""
