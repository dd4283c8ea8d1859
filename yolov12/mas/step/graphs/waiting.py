"""What the micro-batches of a batch that ran as usual wait for, if they may be replayed in later batches."""

from __future__ import annotations

from dataclasses import dataclass

from yolov12.mas.step.graphs.size import Size

__all__ = ["Waiting"]


@dataclass
class Waiting:
    """What the micro-batches of a batch wait for."""

    for_capture: bool = False
    """True if one is going to be captured."""
    for_room: bool = False
    """True if one had no room for a graph."""
    for_others: bool = False
    """True if one had no room beside the graphs of other sizes, which a batch in equal micro-batches does not have."""

    def ran_as_usual(self, size: Size, *, has_room: bool, is_alone: bool, is_paused: bool) -> None:
        """Note a micro-batch that ran as usual.

        Args:
            size: Its size.
            has_room: Whether there was room for its graph.
            is_alone: Whether there were no graphs before it.
            is_paused: Whether nothing is captured for a while.
        """
        if size.network is not None or size.is_refused:
            return
        if is_paused:
            self.for_capture = True
        elif has_room:
            size.waited += 1
            self.for_capture |= size.is_patient
        elif is_alone:
            self.for_room = True
        else:
            self.for_others = True
