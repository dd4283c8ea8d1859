"""Room for CUDA graphs: whether decisions count on them, and how many bytes they leave for them."""

from __future__ import annotations

from typing import Protocol

from yolov12.mas.scheduling.candidates import REPLAY_BYTES

__all__ = ["Graphs", "ReplayRoom"]

_MORE = 0.1  # added to the bytes of a graph when they were too few
_MOST = 2.5


class Graphs(Protocol):
    """Graphs of micro-batches, as decisions see them."""

    @property
    def possible(self) -> bool:
        """True if micro-batches of this batch may be replayed, should there be room for their graphs."""

    @property
    def lacks_room(self) -> bool:
        """True if none of this batch was replayed, as there was no room for a graph."""

    @property
    def static_bytes(self) -> int:
        """Bytes of the graphs that count as allocated. Decisions leave them out, as graphs give way."""

    def drop(self) -> None:
        """Drop all graphs and return their memory to the device."""


class ReplayRoom:
    """Bytes that a decision leaves for a graph. They get more if a graph had no room in them."""

    def __init__(self) -> None:
        self.graphs: Graphs | None = None
        """Graphs of the run; None if there are none."""
        self.expected = False
        """True if the latest decision left room for a graph."""
        self._bytes = REPLAY_BYTES

    def bytes(self) -> float:
        """Return bytes relative to those of a micro-batch, see `State.replay_bytes`; 0 if there are no graphs now."""
        return self._bytes if self.graphs is not None and self.graphs.possible else 0.0

    def static_bytes(self) -> int:
        """Return the bytes of graphs that count as allocated now."""
        return self.graphs.static_bytes if self.graphs is not None else 0

    def moved(self) -> None:
        """Drop the graphs of another size or plan, as they would be in the way of the new one."""
        if self.graphs is not None:
            self.graphs.drop()

    def completed(self) -> bool:
        """End a batch; return whether it ran in graphs, or as it does where graphs were expected."""
        lacked_room = self.expected and self.graphs is not None and self.graphs.lacks_room
        if lacked_room and self._bytes < _MOST:
            self._bytes = min(self._bytes + _MORE, _MOST)
            return False
        return self.expected
