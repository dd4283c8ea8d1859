"""Replays of small micro-batches as CUDA graphs, where the host is what is waited for.

A micro-batch of a detector launches thousands of kernels. If it has few images, the host takes longer to launch them
than the GPU to run them. A CUDA graph launches all of them at once. The network's forward and backward pass are
captured, the loss between them is not: it runs as usual.

A size (micro-batch, image size, checkpoint plan, settings) is captured after it has run a few times, and only if memory
suffices. It stays captured if it is measured to be faster. Graphs hold memory that PyTorch's allocator counts as
reserved, but not as allocated. Decisions may leave room for it, and it gives way: all graphs are dropped before a
micro-batch would not fit beside them, and after any failure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import Checkpointing, Plan
from yolov12.mas.memory.reading import Meter, Stopwatch
from yolov12.mas.modules import overridden
from yolov12.mas.oom import Failure, is_out_of_memory
from yolov12.mas.step.graphs.leaves import Leaves
from yolov12.mas.step.graphs.network import Around, Example, GraphedNetwork, NotReplayableError, reason_of, watched
from yolov12.mas.step.graphs.recorder import Graphs, Recorder
from yolov12.mas.step.graphs.size import RUNS, Size, is_hopeless
from yolov12.mas.step.graphs.waiting import Waiting
from yolov12.mas.step.graphs.watch import ModelWatch, settings
from yolov12.mas.step.retry import IN_A_CAPTURE, Note
from yolov12.mas.step.snapshots import ModuleState, changing
from yolov12.mas.step.upsampling import Upsampling
from yolov12.mas.task import Task

__all__ = ["Replays"]

_MISSES = 3  # number of passes unlike the captured one after which a size is not captured any more
_SIZES = 64  # most sizes that are watched
# Without captures after graphs had to give way, or lacked memory that they once had; twice as many after every further
# time.
_PAUSE_BATCHES = 16
# Usual runs whose time graphs have saved before they give way without a pause. A capture took as long as 3 to 8 of them
# on an H200.
_PAID = 8.0
_MUCH_MORE = 1.25  # room for a capture, relative to that in which it failed, with which it is tried again
_SMALL = 0.05  # fraction of the budget up to which graphs need not give way to a validation


class Replays:
    """Decides which micro-batches are replayed, and replaces the model's forward pass meanwhile.

    Args:
        model: Model; its network is a call with one tensor.
        task: Computes the loss. Nothing is replayed unless its `may_replay` returns True, see `task.TensorTask`.
        norms: BatchNorm layers of the model.
        upsampling: Upsampling layers of the model.
        checkpointing: Applies checkpoint plans.
        meter: Meter of the device.
        graphs: None to replay nothing.
        log: Called with a line for the user if a capture fails.
        note: Called with an event for each failed allocation in a capture, or in a micro-batch beside graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        norms: GroupedBatchNorm,
        upsampling: Upsampling,
        checkpointing: Checkpointing,
        meter: Meter,
        graphs: Graphs | None,
        log: Callable[[str], None],
        note: Note,
    ) -> None:
        self._model, self._norms, self._upsampling, self._checkpointing = model, norms, upsampling, checkpointing
        self._meter, self._graphs, self._log, self._note = meter, graphs, log, note
        self._may_replay: Callable[[nn.Module], bool] = getattr(task, "may_replay", lambda model: False)
        self._watch = ModelWatch(model)
        self._sizes: dict[tuple[Any, ...], dict[Example, Size]] = {}
        self.idle_bytes = 0
        """Bytes of the graphs that count as reserved, and not as allocated."""
        self.static_bytes = 0
        """Bytes of the graphs that count as allocated."""
        self.count = 0
        """Number of micro-batches of this batch that were replayed."""
        self.has_captured = False
        """True if this batch captured a graph, so that its time is not representative."""
        self.usual_ms: dict[int, float] = {}
        """Images in each micro-batch that was captured in this batch → milliseconds without a graph."""
        self.is_replay = False
        """True if the latest micro-batch was replayed: its gradients are in memory that the next one overwrites."""
        self._is_active = self._fits = False
        self._waiting = Waiting()
        self._key: tuple[Any, ...] | None = None
        self._pause = self._times_given_way = self._first_group = self._calls = 0
        self._saved = 0.0  # usual runs whose time the graphs have saved
        self._size: Size | None = None  # of the micro-batch that runs
        self._has_room, self._needed_bytes, self._allocated_bytes = False, 0, 0  # of it, before it
        self._is_alone = True  # whether there were no graphs before it
        self._seen: dict[int, Example] = {}  # its output tensors that got gradients, and the forms of these

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin a batch: drop all graphs if anything of the model has changed, or would be missed.

        Args:
            parameters: Parameters that get gradients.
        """
        self.count, self.has_captured, self.is_replay, self._key = 0, False, False, None
        self._is_active, self._waiting, self.usual_ms = False, Waiting(), {}
        if self._graphs is None:
            return
        self._pause = max(self._pause - 1, 0)
        self._parameters = parameters
        if self._watch.changed():
            self.drop()
            self._sizes.clear()
        self._is_active = not self._watch.why_not() and not self._norms.ungrouped and self._may_replay(self._model)
        if not self._is_active:
            self.drop()
        self._settings = settings()

    @property
    def possible(self) -> bool:
        """True if micro-batches of this batch may be replayed, should there be room for their graphs."""
        return self._is_active and not self._pause and not is_hopeless(self._sizes.values())

    @property
    def waits(self) -> bool:
        """True if a micro-batch of this batch ran as usual, and is going to be captured."""
        return self._waiting.for_capture or (self._waiting.for_others and not self.count)

    @property
    def lacks_room(self) -> bool:
        """True if none of this batch was replayed, as there was no room for a graph."""
        return self._waiting.for_room and not self.count

    def prepare(self, groups: Sequence[int], plan: Plan, start: int, stop: int) -> int:
        """Decide how the next micro-batch runs, capture its network if it is time to, and reset the meter's peak.

        Args:
            groups: Numbers of images in its BatchNorm groups.
            plan: Its checkpoint plan.
            start: First image.
            stop: Image after the last.

        Returns:
            Bytes that are allocated now, and those of the graphs.
        """
        self._key, self._fits, self.is_replay = None, False, False
        if self._is_active and torch.is_grad_enabled():
            self._decide(tuple(groups), plan, start, stop)
        self._allocated_bytes = self._meter.mark()
        return self._allocated_bytes + self.idle_bytes

    def _decide(self, groups: tuple[int, ...], plan: Plan, start: int, stop: int) -> None:
        assert self._graphs is not None
        self._key = (groups, plan, self._settings)
        sizes = self._sizes.setdefault(self._key, {})
        for size in sizes.values():
            size.judge()
        if any(size.is_refused and size.network is not None for size in sizes.values()):
            self.drop()  # the memory of the pool is freed only with all graphs
        self._is_alone = not self._held()
        needed_bytes, capture_bytes, budget_bytes = self._graphs.room(start, stop)
        self._needed_bytes, spare_bytes = needed_bytes, self._spare_bytes(budget_bytes)
        self._has_room = capture_bytes <= spare_bytes
        for example, size in list(sizes.items()):
            has_room = max(capture_bytes, size.held_bytes) <= spare_bytes
            self._has_room &= has_room
            if has_room and size.is_due and not self._pause:
                before_bytes = spare_bytes
                self._capture(example, size, groups, plan, spare_bytes)
                spare_bytes = self._spare_bytes(budget_bytes)
                if not size.fits(needed_bytes, before_bytes, spare_bytes):
                    self.drop()
                    self._has_room, spare_bytes = False, self._spare_bytes(budget_bytes)
        held = [size for size in sizes.values() if size.network is not None]
        self._fits = all(size.beside_bytes(needed_bytes) <= spare_bytes for size in held)
        if self.idle_bytes and needed_bytes > spare_bytes and not (held and self._fits):
            if self._saved >= _PAID:
                self.drop()
            else:
                self.give_way()

    def _spare_bytes(self, budget_bytes: int) -> int:
        return budget_bytes - self._meter.mark() - self.idle_bytes

    @contextmanager
    def within(self, first_group: int) -> Iterator[None]:
        """Replay the network, or watch it, while the micro-batch of `prepare` runs forward and backward.

        Args:
            first_group: Number of BatchNorm groups of the batch that come before the micro-batch.
        """
        if self._key is None:
            yield
            return
        self._first_group, self._calls, self._size, self._seen = first_group, 0, None, {}
        watch = self._meter.stopwatch()
        with overridden({self._model: partial(self._call, self._model.forward)}):
            yield
        watch.stop()
        if self._size is not None:
            self._learn(self._size, watch)

    def give_way(self, failure: Failure | None = None) -> bool:
        """Drop all graphs for a while, as a micro-batch failed or does not fit beside them.

        Args:
            failure: The failure; None if it is predicted that the micro-batch does not fit.

        Returns:
            True if there were any, so that a micro-batch that failed may run again unchanged.
        """
        if not self._held():
            return False
        self._pause_captures()
        if failure is not None and failure.lacked_memory:
            self._note(f"out-of-memory at {failure.images}")
        elif failure is not None and self._size is not None:
            self._size.misses += 1
            self._size.is_refused |= self._size.misses >= _MISSES
        self.drop()
        return True

    def _pause_captures(self) -> None:
        self._pause = _PAUSE_BATCHES << min(self._times_given_way, 8)
        self._times_given_way += 1

    def release(self) -> None:
        """Return memory to the device: that of the graphs, and the allocator's cache."""
        self.drop()
        self._meter.release()

    def drop(self) -> None:
        """Drop all graphs and return their memory to the device. Sizes that were faster are captured again."""
        self._saved = 0.0
        for size in (held := self._held()):
            size.network = None
            size.replays.clear()
        if held or self.idle_bytes:
            self._release()

    def make_room(self) -> None:
        """Drop the graphs before a validation, unless they are small."""
        if self._graphs is not None and self.idle_bytes > _SMALL * self._meter.read().reachable_bytes:
            self.drop()

    def _held(self) -> list[Size]:
        return [size for sizes in self._sizes.values() for size in sizes.values() if size.network is not None]

    def _release(self) -> None:
        assert self._graphs is not None
        self._graphs.recorder.release()
        self.idle_bytes = self.static_bytes = 0

    def _capture(self, example: Example, size: Size, groups: tuple[int, ...], plan: Plan, spare_bytes: int) -> None:
        """Capture a network. Whatever fails, the size runs as usual from then on.

        If it lacked memory, it does so until there is much more room, or for a while if it was replayed before.
        """
        assert self._graphs is not None
        self.has_captured, size.waited = True, 0
        self.usual_ms[sum(groups)] = size.usual_ms
        self._meter.release(thorough=False)
        try:
            size.network = self._graphed(self._graphs.recorder, example, size, groups, plan)
            self.idle_bytes += size.network.idle_bytes
            self.static_bytes += size.network.static_bytes
            return
        except Exception as error:  # what is not an error without a graph shows itself again then
            self._log(f"memory: micro-batches of {sum(groups)} images run without CUDA graphs: {reason_of(error)}")
            if is_out_of_memory(error):
                self._note(IN_A_CAPTURE)
                self._has_room = False
                if size.replayed:  # it had this room before: others may have taken it for a moment
                    self._pause_captures()
                else:
                    size.held_bytes = math.ceil(_MUCH_MORE * spare_bytes)
            else:
                size.is_refused = True
        # This stands outside of the `except` block, whose traceback kept the tensors of the capture.
        self.drop()
        self._release()

    def _graphed(
        self, recorder: Recorder, example: Example, size: Size, groups: tuple[int, ...], plan: Plan
    ) -> GraphedNetwork:
        drafts, leaves = self._norms.drafts(), Leaves(self._model, self._parameters)
        kept = ModuleState(changing([*self._model.modules()]))  # as those of InstanceNorm: a capture runs the network

        @contextmanager
        def passes() -> Iterator[None]:
            with leaves.within(), self._norms.aside(drafts), self._norms.within(groups, 0), self._upsampling.within():
                yield

        around = Around(passes, lambda: self._checkpointing.within(plan), drafts)
        try:
            run = partial(size.context.run, self._model.forward)
            return GraphedNetwork(run, around, example, leaves, size.wanted, recorder, self._meter)
        finally:
            kept.restore()

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in place of the model's forward pass."""
        if len(args) != 1 or kwargs or type(args[0]) is not Tensor or self._key is None:
            return forward(*args, **kwargs)
        x: Tensor = args[0]
        example, sizes = Example.of(x), self._sizes[self._key]
        self._calls += 1
        if example not in sizes and sum(map(len, self._sizes.values())) < _SIZES:
            sizes[example] = Size()
        size = self._size = sizes.get(example)
        if size is None:
            return forward(x)
        if x.requires_grad or self._calls > 1:
            size.is_refused = True
        if size.network is None or size.is_refused or not self._fits:
            size.context, after_loss = copy_context(), size.loss_meter(self._meter, self._allocated_bytes)
            found = forward(x)
            try:
                return found if size.is_refused else watched(found, self._seen, after_loss(self._needed_bytes))
            except NotReplayableError:
                size.is_refused = True
                return found
        self.is_replay = True
        found = size.network(x)
        self._norms.adopt(size.network.drafts, self._first_group)
        return found

    def _learn(self, size: Size, watch: Stopwatch) -> None:
        if self.is_replay:
            self._saved += size.saved
            self.count += 1
            size.replayed = True
            if not size.is_faster:
                size.replays.append(watch)
            return
        room = {"has_room": self._has_room, "is_alone": self._is_alone}
        self._waiting.ran_as_usual(size, **room, is_paused=self._pause > 0)
        size.runs = size.runs + 1 if self._seen.keys() == size.wanted.keys() else 1
        size.wanted = self._seen
        size.usual = [*size.usual, watch][-RUNS:]
