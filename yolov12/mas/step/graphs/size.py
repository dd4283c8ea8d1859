"""What is known of one size of micro-batch (images, image size, checkpoint plan, settings) that may be replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from statistics import median

from yolov12.mas.memory.reading import Meter, Stopwatch
from yolov12.mas.step.graphs.network import Example, GraphedNetwork

__all__ = ["RUNS", "Size", "is_hopeless"]

RUNS = 3
"""Number of times that a size runs before it is captured, and after that before it is judged."""
_FASTER = 0.95  # largest time of a replay, relative to that without a graph, for which a size stays captured
# Runs as usual, after a graph was no faster, from which it is seen whether it would be by now; twice as many after each
# further capture. The first few runs may have been luckier than most: on an H200, replays of 128 images of YOLO12-S
# were 4 % faster than the fastest of them, and 17 % faster than the usual runs that came afterwards.
_LOOK_AGAIN = 16
_PATIENCE = 16  # runs as usual after which a size that has room for a graph is not expected to be captured any more
_HOPELESS = 2  # sizes that cannot be captured, if no other was faster, after which none is expected to be
_LOSS = 1.25  # bytes that the loss may need, relative to the most that were measured


@dataclass
class Size:
    """State of one size of micro-batch, from its first run to its replays."""

    runs: int = 0
    """Number of times that it ran as usual and alike."""
    wanted: dict[int, Example] = field(default_factory=dict)
    """Index of each output tensor that got a gradient → form of the gradient."""
    usual: list[Stopwatch] = field(default_factory=list)
    """Times of runs as usual that are not known yet."""
    replays: list[Stopwatch] = field(default_factory=list)
    """Times of the first replays."""
    usual_ms: float = math.inf
    """Least milliseconds as usual; once it is to be captured again, the median of the runs for which it is."""
    context: Context = field(default_factory=copy_context)
    """Context variables of the latest pass as usual, such as the layout of predictions that the loss asks for."""
    network: GraphedNetwork | None = None
    is_faster: bool = False
    is_refused: bool = False
    replayed: bool = False
    misses: int = 0
    saved: float = 0.0
    """Fraction of the usual time that a replay saves; 0 until it is known."""
    slow_ms: float = math.inf
    """Least milliseconds of its replays if these were no faster than runs as usual; infinity otherwise."""
    later_ms: list[float] = field(default_factory=list)
    """Milliseconds of the runs as usual since then, or since it was looked at them."""
    looks: int = 0
    """Number of times that it was captured again, as the runs as usual had become slower than the replays."""
    waited: int = 0
    """Number of runs as usual since the last capture, although there was room for one."""
    loss_bytes: int | None = None
    """Most bytes of the input, and of the loss beyond those at the end of the forward pass; None if unknown."""
    upper_bytes: int = 0
    """Bytes that were predicted for the micro-batch, with margin, when that was measured."""
    held_bytes: int = 0
    """Bytes that a graph and the loss need, or seem to need, if a graph had too few; 0 otherwise. It is not captured
    with fewer."""

    @property
    def is_due(self) -> bool:
        """Whether it is to be captured: it has run often enough."""
        is_known = self.runs >= RUNS and self.usual_ms < math.inf and bool(self.wanted)
        return is_known and self.network is None and not self.is_refused

    @property
    def is_patient(self) -> bool:
        """Whether it is still expected to be captured, as it has not run in vain for long."""
        return self.waited <= _PATIENCE

    def beside_bytes(self, needed_bytes: int) -> int:
        """Return the bytes that are needed beside the graph while it is replayed: only the loss needs memory.

        Args:
            needed_bytes: Bytes that the micro-batch needs at most as usual.
        """
        most = needed_bytes - (self.network.kept_bytes if self.network is not None else 0)
        if self.loss_bytes is None:
            return most
        return min(most, math.ceil(_LOSS * self.loss_bytes) + max(needed_bytes - self.upper_bytes, 0))

    def fits(self, needed_bytes: int, before_bytes: int, spare_bytes: int) -> bool:
        """Return whether its new graph leaves room for the loss; True if it was not captured.

        Args:
            needed_bytes: Bytes that the micro-batch needs at most as usual.
            before_bytes: Bytes that were free before the capture.
            spare_bytes: Bytes that are free now.
        """
        if self.network is None or self.beside_bytes(needed_bytes) <= spare_bytes:
            return True
        self.held_bytes = before_bytes - spare_bytes + self.beside_bytes(needed_bytes)
        return False

    def loss_meter(self, meter: Meter, allocated_bytes: int) -> Callable[[int], Callable[[], None]]:
        """Begin to measure the bytes of input and loss, before the forward pass of a run as usual.

        Args:
            meter: Meter of the device.
            allocated_bytes: Bytes that were allocated before the micro-batch and its input.

        Returns:
            A function to call after the forward pass, with the bytes that were predicted for the micro-batch. It
            returns a function to call after the loss.
        """
        if self.runs >= RUNS:
            return lambda upper_bytes: lambda: None
        input_bytes = meter.read().allocated_bytes - allocated_bytes

        def after_forward(upper_bytes: int) -> Callable[[], None]:
            kept_bytes = meter.read().allocated_bytes

            def after_loss() -> None:
                loss_bytes = max(input_bytes + meter.peak_bytes() - kept_bytes, 0)
                if self.loss_bytes is None or loss_bytes > self.loss_bytes:
                    self.loss_bytes, self.upper_bytes = loss_bytes, upper_bytes

            return after_loss

        return after_forward

    def judge(self) -> None:
        """Look at the times that are known by now; refuse a network that is no faster than without a graph.

        A size that was refused for this is captured again if its runs as usual become slower than the replays were.
        """
        usual = [watch.elapsed_ms() for watch in self.usual]
        known = [ms for ms in usual if ms is not None]
        if not self.looks:  # else it is captured again as replays were faster than the median, and a run may be lucky
            self.usual_ms = min([self.usual_ms, *known])
        self.usual = [watch for watch, ms in zip(self.usual, usual, strict=True) if ms is None]
        if self.is_refused and self.slow_ms < math.inf:
            self._look_again(known)
            return
        replays = [ms for ms in (watch.elapsed_ms() for watch in self.replays) if ms is not None]
        if self.network is None or self.is_faster or len(replays) < RUNS:
            return
        self.is_faster = min(replays) <= _FASTER * self.usual_ms
        self.saved = max(1.0 - min(replays) / self.usual_ms, 0.0) if self.usual_ms else 0.0
        self.is_refused = not self.is_faster
        self.slow_ms = math.inf if self.is_faster else min(replays)
        self.replays.clear()

    def _look_again(self, usual_ms: list[float]) -> None:
        self.later_ms += usual_ms
        if len(self.later_ms) < _LOOK_AGAIN << self.looks:
            return
        later_ms = median(self.later_ms)
        self.later_ms.clear()
        if self.slow_ms <= _FASTER * later_ms:
            self.usual_ms, self.slow_ms, self.is_refused = later_ms, math.inf, False
            self.looks += 1


def is_hopeless(sizes: Iterable[Mapping[Example, Size]]) -> bool:
    """Return whether some sizes could not be captured and none was faster, so that others will not be either."""
    every = [size for each in sizes for size in each.values()]
    failed = sum(size.is_refused and not size.replayed for size in every)
    return failed >= _HOPELESS and not any(size.is_faster for size in every)
