"""Arithmetic on the memory plan of an exported graph. Needs neither torch nor Ultralytics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from yolov12.errors import DoesNotFitError
from yolov12.export.graph import MemoryPlan

__all__ = ["RESERVE_BYTES", "MemoryLimit", "smallest_and_largest", "tensors_limit", "workspace_for"]

RESERVE_BYTES = 48 << 20
"""Bytes a builder takes beside weights, inputs and tensors: scratch memory of kernels, rows padded for alignment."""

_SMALLEST = 32  # pixels: the smallest image that Ultralytics' dynamic engines take


@dataclass(frozen=True)
class MemoryLimit:
    """Memory for an exported graph and its builder."""

    total_bytes: int | None
    """Bytes for weights, inputs, tensors and the builder; None if there is no limit."""
    source: str
    """Origin of the number, in words: `mem_limit`, `workspace` or the memory that is free."""


def smallest_and_largest(shape: Sequence[int], dynamic: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the smallest and the largest input that an exported graph may get.

    The largest is the one that Ultralytics' dynamic engines are built for.

    Args:
        shape: (images, channels, height, width) of the export.
        dynamic: Whether the graph has dynamic axes.
    """
    images, channels, height, width = shape
    if not dynamic:
        return tuple(shape), tuple(shape)
    return (1, channels, _SMALLEST, _SMALLEST), (images, channels, 2 * height, 2 * width)


def workspace_for(plan: MemoryPlan) -> int:
    """Return the bytes that a builder is predicted to need: tensors, weights, inputs, and its reserve."""
    return plan.peak_bytes + plan.weights_bytes + plan.inputs_bytes + RESERVE_BYTES


def tensors_limit(plan: MemoryPlan, total_bytes: int) -> int:
    """Return the bytes that are left for a graph's tensors.

    Args:
        plan: Plan of the graph.
        total_bytes: Bytes for everything that a builder needs.

    Raises:
        DoesNotFitError: Nothing is left.
    """
    fixed = workspace_for(replace(plan, peak_bytes=0))
    if total_bytes <= fixed:
        raise DoesNotFitError(
            f"the exported graph needs {fixed >> 20} MiB for weights, inputs and the builder alone, and there are "
            f"{total_bytes >> 20} MiB. Use a smaller model, imgsz= or batch=, or let it have more"
        )
    return total_bytes - fixed
