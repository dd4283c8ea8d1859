"""Room for CUDA graphs: whether decisions count on them, how many bytes they leave for them, and the bytes taken."""

from __future__ import annotations

from typing import Protocol

from yolov12.mas.scheduling.peak_model import GRAPH_RESERVE
from yolov12.mas.scheduling.scheduler import Decision

__all__ = ["Graphs", "ReplayRoom"]

_MORE = 0.1  # added to the reserve when it was too small
_MOST = 1.3


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
    """Bytes that a decision leaves for a graph, and those that it takes. More are left if a graph had no room."""

    def __init__(self) -> None:
        self.graphs: Graphs | None = None
        """Graphs of the run; None if there are none."""
        self.expected = False
        """True if the latest decision left room for a graph."""
        self.peak_bytes = 0
        """Peak of the micro-batches that were replayed since the latest decision; 0 if there were none."""
        self._reserve = GRAPH_RESERVE
        # (pixels, level) → bytes that the latest replays needed above the memory allocated before. That hardly depends
        # on boxes: a graph has all of its memory from the start, and the loss runs beside it.
        self._needed_bytes: dict[tuple[int, int], int] = {}
        self._arm, self._beside_bytes = (0, 0), 0

    def reserve(self) -> float | None:
        """Return the bytes to leave beyond those of a graph, see `State.graph_reserve`; None if there is none now."""
        return self._reserve if self.graphs is not None and self.graphs.possible else None

    def needed_bytes(self, pixels: int, level: int) -> int:
        """Return the bytes that the latest replays of an arm needed above the memory allocated before; 0 if unknown.

        Args:
            pixels: Pixels of its largest micro-batch.
            level: Its checkpoint plan.
        """
        return self._needed_bytes.get((pixels, level), 0)

    def static_bytes(self) -> int:
        """Return the bytes of graphs that count as allocated now."""
        return self.graphs.static_bytes if self.graphs is not None else 0

    def forget(self) -> None:
        """Forget what replays needed, as the levels are other plans now."""
        self._needed_bytes.clear()

    def moved(self) -> None:
        """Drop the graphs of another size or plan, as they would be in the way of the new one."""
        if self.graphs is not None:
            self.graphs.drop()

    def expect(self, decision: Decision, pixels: int, beside_bytes: int) -> int:
        """Begin to follow a decision; return its predicted peak, which is that of replays once one is known.

        Args:
            decision: The decision.
            pixels: Pixels of its largest micro-batch.
            beside_bytes: Bytes that are allocated beside its micro-batches, without those of graphs.
        """
        self.expected, self._arm, self.peak_bytes = decision.replays, (pixels, decision.level), 0
        self._beside_bytes = beside_bytes
        needed_bytes = self.needed_bytes(*self._arm) if self.expected else 0
        return beside_bytes + needed_bytes if needed_bytes else decision.predicted_bytes

    def completed(self, *, undisturbed: bool) -> bool:
        """End a batch; return whether it ran in graphs, or as it does where graphs were expected.

        Args:
            undisturbed: False if it did not run as first planned.
        """
        was_known = self._arm in self._needed_bytes
        if self.expected and undisturbed:
            self._needed_bytes.pop(self._arm, None)  # if nothing was replayed, nothing may be in the next batch
            if self.peak_bytes:
                self._needed_bytes[self._arm] = self.peak_bytes - self._beside_bytes
        lacked_room = self.expected and self.graphs is not None and self.graphs.lacks_room
        if lacked_room and (was_known or self._reserve < _MOST):
            if not was_known:  # if it was, the graph was dropped, and there is less memory now
                self._reserve = min(self._reserve + _MORE, _MOST)
            return False
        return self.expected
