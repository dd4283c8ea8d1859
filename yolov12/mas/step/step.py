"""Forward and backward of a logical batch in micro-batches, as transactions: each is done, or never was.

The gradient is that of the whole batch at once, however it was split and whatever failed on the way:

- a loss is numerator / normaliser, and numerators and normalisers are added separately (loss.py);
- BatchNorm sees fixed groups of images (batchnorm/grouped.py);
- a micro-batch computes its gradient on its own, and it is added when it is complete. A failed allocation costs the
  micro-batch it hit: its gradient is dropped, the random generators are set back, and the remaining images run again,
  fewer at once;
- several processes exchange nothing until all have run their shares, and then only sums (distributed/ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, Checkpointing, Plan
from yolov12.mas.distributed.ranks import ALONE, NO_NEWS, Ranks, RankStatus
from yolov12.mas.memory.reading import Meter, Stopwatch
from yolov12.mas.oom import Failure, is_out_of_memory
from yolov12.mas.step import gradients
from yolov12.mas.step.loss import Total
from yolov12.mas.step.prefetch import Prefetch
from yolov12.mas.task import Share, Task

__all__ = ["Planner", "Result", "Step"]


class Planner(Protocol):
    """Decides how a batch is split and what its layers keep, and learns how it went."""

    level: int
    """Index of the checkpoint plan that the layers follow, until `plan` is called again."""

    def plan(self, start: int, failure: Failure | None) -> list[tuple[int, ...]]:
        """Split the images from `start` on: for each micro-batch, the sizes of its BatchNorm groups.

        Args:
            start: Number of images that are done.
            failure: Failed allocation that ended the last plan; None at first.

        Raises:
            DoesNotFitError: No smaller split is left to try.
        """

    def done(self, start: int, stop: int, live_bytes: int, peak_bytes: int) -> None:
        """Learn what images `start` to `stop` took: bytes allocated before them, and at their peak."""


@dataclass(frozen=True)
class Result:
    """A batch that was run. Its gradient is on the parameters, added to what was there."""

    loss: Tensor
    """Loss of the whole batch, in the shape of `Loss.value`; on the device, detached."""
    items: Mapping[str, Tensor]
    """Scalars of the whole batch, see `Loss.items`."""
    micro_batches: tuple[int, ...]
    """Number of images in each micro-batch that ran here, in the order they ran."""
    watch: Stopwatch
    """Time of this process's own work."""
    statuses: Sequence[RankStatus] = ()
    """Reports of all ranks."""
    level: int = 0
    """Index of the checkpoint plan of the last micro-batch. This and the fields below come from the engine."""
    predicted_bytes: int = 0
    """Predicted peak of allocated memory."""
    peak_bytes: int = 0
    """Measured peak of allocated memory."""
    budget_bytes: int = 0
    """Memory that this process could use when the batch began, or after the last failure."""
    events: tuple[str, ...] = ()
    """Events of the batch as the journal names them, such as `shrunk 64 to 32`."""


class Step:
    """Runs batches of one model.

    Args:
        model: Model with all parameters on one device.
        task: Splits batches and computes their loss.
        meter: Meter of that device.
        backward: Differentiates a scalar; scales it first if half precision needs that.
        layers: Layers that plans may name: name → layer, see `checkpointing`.
        activations: BatchNorm → its activation, see `batchnorm.grouped.GroupedBatchNorm`.
        ranks: Processes that share each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        meter: Meter,
        backward: Callable[[Tensor], None],
        layers: Mapping[str, nn.Module] | None = None,
        activations: Mapping[nn.Module, nn.Module] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self._task, self._meter, self._backward = model, task, meter, backward
        self._all = list(model.parameters())  # walking through a model takes the host a millisecond
        self._device = self._all[0].device
        self._norms = GroupedBatchNorm(model, activations)
        self.checkpointing = Checkpointing(model, layers or {}, self._norms)
        self.plans: tuple[Plan, ...] = (KEEP_ALL,)
        """Checkpoint plans; a planner's level is an index into them."""
        self._ranks = ranks
        self._parameters: list[nn.Parameter] = []
        self._per_image: Tensor | None = None  # normaliser of the batch before

    @property
    def fused(self) -> int:
        """Number of BatchNorm layers that ran in one operation with their activation in the latest batch."""
        return self._norms.fused

    def run(
        self,
        batch: Any,
        images: int,
        planner: Planner,
        share: Share | None = None,
        status: RankStatus = NO_NEWS,
    ) -> Result:
        """Run a batch, forward and backward.

        Args:
            batch: Batch on the host; of several ranks, this one's share.
            images: Number of images in it.
            planner: Decides how it is split.
            share: What the batch is on all ranks; None for a training in one process.
            status: Report to the other ranks.

        Raises:
            DoesNotFitError: From the planner, here or on another rank. Gradients and running statistics are as before.
            RankError: Another rank failed or is gone.
        """
        share = share or Share(images)
        self._parameters = [parameter for parameter in self._all if parameter.requires_grad]
        before, state = gradients.take(self._parameters), _RandomState(self._device)
        total = Total(share.batch_images, self._task.floor, self._per_image)
        parts = Prefetch(self._device, lambda start, stop: self._task.part(batch, start, stop))
        self._norms.begin()
        watch = self._meter.stopwatch()
        try:
            try:
                ran, groups_done = self._run_share(parts, images, planner, total)
                watch.stop()
                statistics = self._norms.averages(groups_done, share.batch_images)
                self._ranks.reserve([*self._parameters, *statistics])  # while a failure still concerns this rank alone
            except BaseException as error:
                self._ranks.agree(status, error)
                raise
            statuses = self._ranks.agree(status)
            total.sum_over(self._ranks, is_padding=share.is_padding)
            finished = total.finished_gradients()
            summed = [*(gradient for gradient in finished if gradient is not None), *statistics]
            if share.is_padding:
                torch._foreach_zero_(summed)
            self._ranks.sum(summed)
            result = Result(total.loss(), total.items(), tuple(ran), watch, statuses)
            self._per_image = total.normaliser() / share.batch_images
            self._norms.commit(statistics)
        except BaseException:
            parts.drop()
            gradients.give(self._parameters, before)
            state.restore()
            raise
        gradients.give(self._parameters, gradients.add(before, finished))
        return result

    def _run_share(self, parts: Prefetch, images: int, planner: Planner, total: Total) -> tuple[list[int], list[int]]:
        """Run this rank's share; return the sizes of its micro-batches, and those of their BatchNorm groups."""
        ran: list[int] = []
        groups_done: list[int] = []
        start, failure = 0, None
        while start < images:
            plan = planner.plan(start, failure)
            failure = None
            for index, groups in enumerate(plan):
                stop = start + sum(groups)
                following = stop + sum(plan[index + 1]) if index + 1 < len(plan) else stop
                live_bytes = self._meter.mark()
                layers = self.checkpointing.within(self.plans[planner.level])
                failure = self._attempt(parts, (start, stop, following), groups, len(groups_done), total, layers)
                if failure is not None:
                    break
                planner.done(start, stop, live_bytes, self._meter.peak_bytes())
                groups_done += groups
                ran.append(stop - start)
                start = stop
        return ran, groups_done

    def try_out(
        self, batch: Any, start: int, stop: int, around: AbstractContextManager[None] | None = None
    ) -> tuple[int, int] | Failure:
        """Run images `start` to `stop` of a batch as one BatchNorm group, and keep nothing but what it took.

        Args:
            batch: Batch on the host.
            start: First image.
            stop: Image after the last.
            around: Context of the forward pass; by default the plan that keeps everything.

        Returns:
            Bytes allocated before it and at its peak, or the failure.
        """
        self._parameters = [parameter for parameter in self._all if parameter.requires_grad]
        before = gradients.take(self._parameters)
        parts = Prefetch(self._device, lambda first, last: self._task.part(batch, first, last))
        state = _RandomState(self._device)
        self._norms.begin()
        try:
            live_bytes = self._meter.mark()
            around = around or self.checkpointing.within(KEEP_ALL)
            total = Total(stop, self._task.floor)
            failure = self._attempt(parts, (start, stop, stop), (stop - start,), 0, total, around)
            return failure or (live_bytes, self._meter.peak_bytes())
        finally:
            state.restore()
            gradients.give(self._parameters, before)

    def _attempt(
        self,
        parts: Prefetch,
        span: tuple[int, int, int],
        groups: tuple[int, ...],
        first_group: int,
        total: Total,
        layers: AbstractContextManager[None],
    ) -> Failure | None:
        start, stop, following = span
        state = _RandomState(self._device)
        try:
            part = parts.get(start, stop)
            if following > stop:
                parts.prefetch(stop, following)
            with self._norms.within(groups, first_group):
                with layers:
                    loss = self._task.loss(self.model, part)
                with torch.autocast(self._device.type, enabled=False):  # a backward pass uses the dtypes of its forward
                    self._backward(total.scaled(loss, stop - start))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = Failure(stop - start, str(error), self._meter.peak_bytes())
        else:
            total.add(loss, stop - start, gradients.take(self._parameters))
            return None
        # Outside of the `except` block, as its traceback held every tensor of the failed attempt.
        part = loss = None  # type: ignore[assignment]
        parts.drop()
        gradients.take(self._parameters)
        state.restore()
        self._meter.release()
        return failure


class _RandomState:
    """State of the random generators of the host and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
