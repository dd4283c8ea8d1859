"""Forward and backward pass of a logical batch in micro-batches. Each micro-batch is a transaction: all or nothing.

The gradient is that of the whole batch at once, however the batch was split and whatever allocations failed:

- a loss is numerator / normaliser, and numerators and normalisers are added separately (loss.py);
- BatchNorm normalises fixed groups of images (batchnorm/grouped.py);
- the gradient of a micro-batch is computed separately, and added when it is complete. After a failed allocation, the
  gradient of that micro-batch is dropped, the random generators are restored, and the remaining images run again in
  smaller micro-batches;
- several ranks exchange nothing until all of them have run their shares, and then only sums (distributed/ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, Checkpointing, Plan
from yolov12.mas.distributed.ranks import ALONE, NO_NEWS, Ranks, RankStatus
from yolov12.mas.memory.reading import Meter, Stopwatch
from yolov12.mas.modules import Structure
from yolov12.mas.oom import Failure, is_out_of_memory
from yolov12.mas.step import gradients
from yolov12.mas.step.loss import Total
from yolov12.mas.step.prefetch import Prefetch
from yolov12.mas.task import Share, Task

__all__ = ["Planner", "Result", "Step"]


class Planner(Protocol):
    """Decides how a batch is split and what its layers keep, and learns from the micro-batches that ran."""

    level: int
    """Index of the checkpoint plan that layers follow until the next call of `plan`."""

    def plan(self, start: int, failure: Failure | None) -> list[tuple[int, ...]]:
        """Split the remaining images into micro-batches.

        Args:
            start: Number of images that are done.
            failure: Failed allocation that ended the last plan; None at first.

        Returns:
            For each micro-batch, the numbers of images in its BatchNorm groups.

        Raises:
            DoesNotFitError: No smaller split is left to try.
        """

    def done(self, start: int, stop: int, allocated_bytes: int, peak_bytes: int) -> None:
        """Learn from a micro-batch that ran.

        Args:
            start: First image.
            stop: Image after the last.
            allocated_bytes: Allocated bytes before the micro-batch.
            peak_bytes: Peak of allocated bytes while it ran.
        """


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
    statuses: Sequence[RankStatus] = ()
    """Reports of all ranks."""
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


class Step:
    """Runs batches of one model.

    Args:
        model: Model with all parameters on one device.
        task: Adapter that splits batches and computes their loss.
        meter: Meter of that device.
        backward: Differentiates a scalar; in half precision it may scale it first.
        layers: Layers that checkpoint plans may name: name → layer, see `checkpointing`.
        activations: BatchNorm → activation of its output, see `batchnorm.grouped.GroupedBatchNorm`.
        ranks: Processes that share each batch.
        log: Called with lines for the user.
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
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self._task, self._meter, self._backward = model, task, meter, backward
        self._all = list(model.parameters())  # to walk through a model takes a millisecond of host time
        self._structure = Structure(model)
        self._device = self._all[0].device
        self._norms = GroupedBatchNorm(model, activations, log=log)
        self.checkpointing = Checkpointing(model, layers or {}, self._norms)
        self.plans: tuple[Plan, ...] = (KEEP_ALL,)
        """Checkpoint plans. The level of a planner is an index into them."""
        self._ranks = ranks
        self._parameters: list[nn.Parameter] = []
        self._per_image: Tensor | None = None  # normaliser per image of the previous batch

    @property
    def fused(self) -> int:
        """Number of BatchNorm layers that the latest batch ran in one operation with their activation."""
        return self._norms.fused

    def run(
        self,
        batch: Any,
        images: int,
        planner: Planner,
        share: Share | None = None,
        status: RankStatus = NO_NEWS,
    ) -> Result:
        """Run the forward and backward pass of a batch.

        Args:
            batch: Batch on the host; with several ranks, this rank's share.
            images: Number of images in `batch`.
            planner: Decides how the batch is split.
            share: Description of the whole batch over all ranks; None for a training in one process.
            status: Report to the other ranks.

        Returns:
            Loss and items of the whole batch, and the micro-batches that ran here.

        Raises:
            DoesNotFitError: The planner found no way to run the batch, here or on another rank. Gradients and running
                statistics are as before.
            RankError: Another rank failed or is gone.
        """
        share = share or Share(images)
        self._begin()
        before, state = gradients.take(self._parameters), _RandomState(self._device)
        total = Total(share.batch_images, self._task.floor, self._per_image)
        parts = Prefetch(self._device, lambda start, stop: self._task.part(batch, start, stop))
        watch = self._meter.stopwatch()
        try:
            try:
                ran, groups_done = self._run_share(parts, images, planner, total)
                watch.stop()
                statistics = self._norms.averages(groups_done, share.batch_images)
                # Reserved now, while a failed allocation still concerns only this rank.
                self._ranks.reserve([*self._parameters, *statistics])
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

    def _begin(self) -> None:
        """Look at the model as it is now: users may have replaced layers, frozen or switched them."""
        if self._structure.changed():
            self._all = list(self.model.parameters())
            self._norms.find_layers()
            self.checkpointing.find_activations()
        self._parameters = [parameter for parameter in self._all if parameter.requires_grad]
        self._norms.begin()
        if self._norms.ungrouped and self._ranks.size > 1:
            raise ConfigError(
                f"{type(self._norms.ungrouped[0]).__name__} is not PyTorch's BatchNorm, so several processes cannot "
                "share a batch: train in one, or with mas=False"
            )

    def _run_share(self, parts: Prefetch, images: int, planner: Planner, total: Total) -> tuple[list[int], list[int]]:
        """Run this rank's share; return the sizes of its micro-batches and of their BatchNorm groups."""
        ran: list[int] = []
        groups_done: list[int] = []
        start, failure = 0, None
        while start < images:
            plan = planner.plan(start, failure)
            failure = None
            for index, groups in enumerate(plan):
                stop = start + sum(groups)
                following = stop + sum(plan[index + 1]) if index + 1 < len(plan) else stop
                allocated_bytes = self._meter.mark()
                layers = self.checkpointing.within(self.plans[planner.level])
                failure = self._attempt(parts, (start, stop, following), groups, len(groups_done), total, layers)
                if failure is not None:
                    break
                planner.done(start, stop, allocated_bytes, self._meter.peak_bytes())
                groups_done += groups
                ran.append(stop - start)
                start = stop
        return ran, groups_done

    def try_out(
        self, batch: Any, start: int, stop: int, around: AbstractContextManager[None] | None = None
    ) -> tuple[int, int] | Failure:
        """Run images `start` to `stop` of a batch as one BatchNorm group, measure their memory and undo all effects.

        Args:
            batch: Batch on the host.
            start: First image.
            stop: Image after the last.
            around: Context of the forward pass; by default that of the plan that keeps everything.

        Returns:
            Allocated bytes before the images and at their peak, or the failed allocation.
        """
        self._begin()
        before = gradients.take(self._parameters)
        parts = Prefetch(self._device, lambda first, last: self._task.part(batch, first, last))
        state = _RandomState(self._device)
        try:
            allocated_bytes = self._meter.mark()
            around = around or self.checkpointing.within(KEEP_ALL)
            total = Total(stop, self._task.floor)
            failure = self._attempt(parts, (start, stop, stop), (stop - start,), 0, total, around)
            return failure or (allocated_bytes, self._meter.peak_bytes())
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
                # A backward pass uses the dtypes of its forward pass.
                with torch.autocast(self._device.type, enabled=False):
                    self._backward(total.scaled(loss, stop - start))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = Failure(stop - start, str(error), self._meter.peak_bytes())
        else:
            total.add(loss, stop - start, gradients.take(self._parameters))
            return None
        # This stands outside of the `except` block, whose traceback kept every tensor of the failed attempt.
        part = loss = None  # type: ignore[assignment]
        parts.drop()
        gradients.take(self._parameters)
        state.restore()
        self._meter.release()
        return failure


class _RandomState:
    """Copy of the state of the random generators of the host and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
