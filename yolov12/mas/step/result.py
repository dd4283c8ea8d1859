"""Outcome of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from yolov12.mas.distributed.ranks import RankStatus
from yolov12.mas.memory.reading import Stopwatch

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """Outcome of a batch. Its gradient has been added to that of the parameters."""

    loss: Tensor
    """Loss of the whole batch, in the shape of `Loss.value`; on the device, detached."""
    items: Mapping[str, Tensor]
    """Scalars of the whole batch, see `Loss.items`."""
    micro_batches: tuple[int, ...]
    """Number of images in each micro-batch that ran here, in the order they ran."""
    watch: Stopwatch
    """Time of this process's own work."""
    ahead: Stopwatch | None = None
    """Time of the pass without gradients, which is part of `watch`; None if there was none."""
    statuses: Sequence[RankStatus] = ()
    """Reports of all ranks."""
    replayed: int = 0
    """Number of micro-batches that ran here as CUDA graphs."""
    has_captured: bool = False
    """True if a CUDA graph was captured, which took time."""
    waits_for_capture: bool = False
    """True if a micro-batch ran as usual and is going to be captured, so that later batches take less time."""
    usual_ms: Mapping[int, float] = field(default_factory=dict)
    """Images in each micro-batch that was captured → milliseconds without a graph."""
    level: int = 0
    """Index of the checkpoint plan of the last micro-batch. The engine fills in this field and those below."""
    predicted_bytes: int = 0
    """Predicted peak of allocated memory."""
    peak_bytes: int = 0
    """Measured peak of allocated memory."""
    budget_bytes: int = 0
    """Memory that this process could use when the batch began or, after a failure, when it was read again."""
    events: tuple[str, ...] = ()
    """Events of the batch, as the journal names them, such as `shrunk 64 to 32`."""
