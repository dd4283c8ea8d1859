"""Protocol of the planner that a step asks how to run a batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

from yolov12.mas.oom import Failure

__all__ = ["MicroBatches", "Planner", "groups_of"]

MicroBatches = Sequence[tuple[int, ...]]
"""For each micro-batch, the numbers of images in its BatchNorm groups."""


class Planner(Protocol):
    """Decides how a batch is split and what its layers keep, and learns from the micro-batches that ran."""

    level: int
    """Index of the checkpoint plan that layers follow until the next call of `plan`."""

    def plan(self, start: int, failure: Failure | None) -> MicroBatches:
        """Split the remaining images into micro-batches.

        Args:
            start: Number of images that are done.
            failure: Failed allocation that ended the last plan; None at first.

        Returns:
            For each micro-batch, the numbers of images in its BatchNorm groups.

        Raises:
            DoesNotFitError: No smaller split is left to try.
        """

    def done(
        self, start: int, stop: int, allocated_bytes: int, peak_bytes: int | None, is_replay: bool = False
    ) -> None:
        """Learn from a micro-batch that ran.

        Args:
            start: First image.
            stop: Image after the last.
            allocated_bytes: Allocated bytes before the micro-batch.
            peak_bytes: Peak of allocated bytes while it ran; None for a pass without gradients, which needs less.
            is_replay: True if a CUDA graph was replayed, whose memory was allocated before: the peak tells nothing
                about the size.
        """


def groups_of(plan: MicroBatches) -> list[int]:
    """Return the sizes of all BatchNorm groups of a plan."""
    return list(chain.from_iterable(plan))
