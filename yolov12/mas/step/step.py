"""Forward and backward pass of a logical batch in micro-batches. Each micro-batch is a transaction: all or nothing.

The gradient is that of the whole batch at once, however the batch was split and whatever allocations failed:

- a loss is numerator / normaliser, and numerators and normalisers are added separately (loss.py). If it has several
  normalisers, a batch that is split runs ahead without gradients, which gives their sums;
- BatchNorm normalises fixed groups of images (batchnorm/grouped.py);
- the gradient of a micro-batch is computed separately, and added when it is complete. After a failed allocation, the
  gradient of that micro-batch is dropped, random generators and what layers of the user's own keep are restored, and
  the remaining images run again in smaller micro-batches;
- several ranks exchange nothing until all of them have run their shares, or have run ahead, and then only sums
  (distributed/ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, Checkpointing, Plan
from yolov12.mas.distributed.ranks import ALONE, NO_NEWS, Ranks, RankStatus, telling
from yolov12.mas.distributed.reached import Reached
from yolov12.mas.memory.reading import Meter
from yolov12.mas.modules import Structure
from yolov12.mas.oom import Failure, is_out_of_memory
from yolov12.mas.step import gradients
from yolov12.mas.step.graphs.network import NotReplayableError
from yolov12.mas.step.graphs.recorder import Graphs
from yolov12.mas.step.graphs.replays import Replays
from yolov12.mas.step.loss import Total, UnknownNormalisersError
from yolov12.mas.step.planner import MicroBatches, Planner, groups_of
from yolov12.mas.step.prefetch import Prefetch
from yolov12.mas.step.result import Result
from yolov12.mas.step.retry import IN_A_WARM_UP, Note, Retry, no_note
from yolov12.mas.step.snapshots import PassState, changing
from yolov12.mas.step.upsampling import Upsampling
from yolov12.mas.task import Share, Task

__all__ = ["Step"]

_LOOKS = 3
"""Most passes without gradients before a batch: again if a failed allocation has changed its BatchNorm groups."""


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
        exact: False to weight the parts of a loss with several normalisers by their numbers of images.
        note: Called with an event for each failed allocation outside of micro-batches.
        graphs: For replays of small micro-batches as CUDA graphs, see `graphs.replays`; None for none.
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
        *,
        exact: bool = True,
        note: Note = no_note,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self._task, self._meter, self._backward = model, task, meter, backward
        self._note = note
        self.notes_tries = True  # False while `try_out` repeats what has failed before
        self.parameters = list(model.parameters())  # to walk through a model takes a millisecond of host time
        self._modules = list(model.modules())
        self._structure = Structure(model)
        self._device = self.parameters[0].device
        self.norms = GroupedBatchNorm(model, activations, log=log)
        """BatchNorm layers of the model."""
        self._upsampling = Upsampling(model)
        self.checkpointing = Checkpointing(model, layers or {}, self.norms)
        self.replays = Replays(model, task, self.norms, self._upsampling, self.checkpointing, meter, graphs, log, note)
        self._retry = Retry(self.replays.release, note)
        self.plans: tuple[Plan, ...] = (KEEP_ALL,)
        """Checkpoint plans. The level of a planner is an index into them."""
        self._ranks = ranks
        self._parameters: list[nn.Parameter] = []
        self._changing: list[nn.Module] = []
        self._per_image: Tensor | None = None  # normaliser per image of the previous batch
        self._exact, self._has_terms = exact, False  # whether the latest loss had several normalisers

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
            DoesNotFitError: The planner found no way to run the batch, here or on another rank. Gradients, buffers and
                attributes of layers are as before.
            RankError: Another rank failed or is gone.
        """
        share = share or Share(images)
        for restarts in (True, True, False):
            try:
                return self._run(batch, images, planner, share, status, restarts=restarts)
            except UnknownNormalisersError:  # the first loss shows that there are several, or groups have changed
                if not restarts:
                    raise
        raise AssertionError

    def _run(
        self, batch: Any, images: int, planner: Planner, share: Share, status: RankStatus, *, restarts: bool
    ) -> Result:
        self._retry(self._begin)
        state, watch = self._state(), self._meter.stopwatch()
        parts = Prefetch(self._device, lambda start, stop: self._task.part(batch, start, stop), self._note)
        looks_ahead, ahead, ahead_watch = self._exact and self._has_terms, None, None
        before = gradients.take(self._parameters)  # last, as what fails above would lose them
        try:
            with telling(self._ranks, NO_NEWS if looks_ahead else status, UnknownNormalisersError):
                plan = planner.plan(0, None)
                if looks_ahead:
                    ahead_watch = self._meter.stopwatch()
                    plan, ahead = self._look_ahead(parts, images, plan, planner, share, restarts=restarts)
                    ahead_watch.stop()
            if ahead is not None:
                self._ranks.agree(NO_NEWS)
                ahead.sum_over(self._ranks, self._retry, is_padding=share.is_padding)
            exact, is_shared = self._exact, self._ranks.size > 1
            total = Total(
                share.batch_images, self._task.floor, self._per_image, ahead=ahead, exact=exact, is_shared=is_shared
            )
            with telling(self._ranks, status, UnknownNormalisersError):
                restarts = restarts and not is_shared  # other ranks would not begin again
                ran, groups_done = self._run_share(parts, images, plan, planner, total, restarts=restarts)
                watch.stop()
                statistics = self._retry(lambda: self.norms.averages(groups_done, share.batch_images))
                # Reserved now, while a failed allocation still concerns only this rank.
                self._retry(lambda: self._ranks.reserve([*self._parameters, *statistics]))
            reached = Reached(total.has_gradient(), self.norms.was_called, is_padding=share.is_padding)
            statuses = self._ranks.agree(status.after(0 if share.is_padding else len(groups_done), reached.digest))
            reached.join(self._ranks, statuses)
            total.sum_over(self._ranks, self._retry, is_padding=share.is_padding)
            scaled = self._retry(total.finished_gradients)
            finished = self._retry(lambda: reached.completed(scaled, self._parameters))
            gradients.sum_over(self._ranks, finished, statistics, is_padding=share.is_padding)
            loss, items = self._retry(total.loss), self._retry(total.items)
            result = Result(
                loss, items, tuple(ran), watch, ahead_watch if ahead else None, statuses,
                replayed=self.replays.count, has_captured=self.replays.has_captured,
                waits_for_capture=self.replays.waits, usual_ms=self.replays.usual_ms,
            )  # fmt: skip
            self._per_image = None if self._has_terms else self._retry(lambda: total.normaliser() / share.batch_images)
            self._retry(lambda: self.norms.commit(statistics, sum(each.groups for each in statuses), reached.called))
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
            self.parameters, self._modules = list(self.model.parameters()), list(self.model.modules())
            self.norms.find_layers()
            self._upsampling.find_layers()
            self.checkpointing.find_activations()
        self._parameters = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._changing = changing(self._modules)
        self.norms.begin()
        self._upsampling.begin()
        self.replays.begin(self._parameters)
        if self.norms.ungrouped and self._ranks.size > 1:
            raise ConfigError(
                f"{type(self.norms.ungrouped[0]).__name__} is not PyTorch's BatchNorm, so several processes cannot "
                "share a batch: train in one, or with mas=False"
            )

    def _state(self) -> PassState:
        return self._retry(lambda: PassState(self._device, self._changing))

    def _run_share(
        self, parts: Prefetch, images: int, plan: MicroBatches, planner: Planner, total: Total, *, restarts: bool
    ) -> tuple[list[int], list[int]]:
        """Run this rank's share; return the sizes of its micro-batches and of their BatchNorm groups."""
        ran: list[int] = []
        groups_done: list[int] = []
        groups_ahead = groups_of(plan)
        with_gradients = torch.is_grad_enabled()
        start = 0
        while start < images:
            for index, groups in enumerate(plan):
                stop = start + sum(groups)
                following = stop + sum(plan[index + 1]) if index + 1 < len(plan) else stop
                layers = self.plans[planner.level] if with_gradients else KEEP_ALL
                while True:
                    allocated_bytes = self.replays.prepare(groups, layers, start, stop)
                    around = self.checkpointing.within(layers)
                    failure = self._attempt(parts, (start, stop, following), groups, len(groups_done), total, around)
                    if failure is None or not self.replays.give_way(failure):
                        break
                if failure is not None:
                    plan = planner.plan(start, failure)
                    if restarts and total.ahead is not None and groups_of(plan) != groups_ahead[len(groups_done) :]:
                        raise UnknownNormalisersError
                    break
                peak_bytes = self.replays.idle_bytes + self._meter.peak_bytes() if with_gradients else None
                planner.done(start, stop, allocated_bytes, peak_bytes, self.replays.is_replay)
                groups_done += groups
                ran.append(stop - start)
                start = stop
                if not (with_gradients or self._has_terms):
                    return ran, groups_done  # there are no normalisers to look for
        return ran, groups_done

    def _look_ahead(
        self, parts: Prefetch, images: int, plan: MicroBatches, planner: Planner, share: Share, *, restarts: bool
    ) -> tuple[MicroBatches, Total | None]:
        """Run this rank's share without gradients, to know the normalisers of its loss.

        Args:
            parts: Parts of the share.
            images: Number of images in the share.
            plan: Micro-batches of the share.
            planner: Plans again after a failed allocation.
            share: Description of the whole batch.
            restarts: False if the batch cannot begin again, should a failure split it later.

        Returns:
            The micro-batches to run now, and the sums of the pass; None for a batch that is not split.
        """
        if restarts and len(plan) == 1 and self._ranks.size == 1:
            return plan, None
        state = self._state()
        try:
            for _ in range(_LOOKS):
                ahead = Total(share.batch_images, self._task.floor)
                with torch.no_grad():
                    ran, groups = self._run_share(parts, images, plan, planner, ahead, restarts=False)
                if not self._has_terms or ran == [sum(groups) for groups in plan]:
                    break
                state.restore()
                self.norms.begin()
                plan = planner.plan(0, None)  # there was a failure
                if groups_of(plan) == groups:
                    break
            return plan, ahead if self._has_terms else None
        finally:
            parts.drop()
            state.restore()
            self.norms.begin()  # a layer that does not run in groups goes on from its latest statistics
            torch.clear_autocast_cache()  # its copies of weights were made without gradients

    def try_out(
        self, batch: Any, start: int, stop: int, around: AbstractContextManager[None] | None = None,
        held: AbstractContextManager[None] | None = None,
    ) -> tuple[int, int] | Failure:  # fmt: skip
        """Run images `start` to `stop` of a batch as one BatchNorm group, measure their memory and undo all effects.

        Args:
            batch: Batch on the host.
            start: First image.
            stop: Image after the last.
            around: Context of the forward pass, such as a checkpoint plan.
            held: Context in which failed allocations are expected, around both passes.

        Returns:
            Allocated bytes before the images and at their peak, or the failed allocation.
        """
        self._retry(self._begin)
        self.replays.drop()
        parts = Prefetch(self._device, lambda first, last: self._task.part(batch, first, last), self._note)
        state = self._state()
        before = gradients.take(self._parameters)
        try:
            allocated_bytes = self._meter.mark()
            total, span = Total(stop, self._task.floor, exact=False), (start, stop, stop)
            with held or nullcontext():
                failure = self._attempt(parts, span, (stop - start,), 0, total, around or nullcontext(), state)
            if failure is not None and self.notes_tries:
                self._note(IN_A_WARM_UP)
            return failure or (allocated_bytes, self._meter.peak_bytes())
        finally:
            state.restore()
            gradients.give(self._parameters, before)

    def _attempt(
        self, parts: Prefetch, span: tuple[int, int, int], groups: tuple[int, ...], first_group: int, total: Total,
        around: AbstractContextManager[None], state: PassState | None = None,
    ) -> Failure | None:  # fmt: skip
        start, stop, following = span
        try:
            state = state or self._state()
            part = parts.get(start, stop)
            if following > stop:
                parts.prefetch(stop, following)
            with self.norms.within(groups, first_group):
                with self._upsampling.within(), self.replays.within(first_group):
                    with around:
                        loss = self._task.loss(self.model, part)
                    self._has_terms = loss.has_terms
                    if torch.is_grad_enabled():
                        # A backward pass uses the dtypes of its forward pass.
                        with torch.autocast(self._device.type, enabled=False):
                            self._backward(total.scaled(loss, stop - start))
                # Nothing may fail after this, or the micro-batch would count twice.
                total.add(loss, stop - start, gradients.take(self._parameters), is_lent=self.replays.is_replay)
        except Exception as error:
            if not (is_out_of_memory(error) or isinstance(error, NotReplayableError)):
                raise
            failure = Failure(stop - start, str(error), self._meter.peak_bytes(), is_out_of_memory(error))
        else:
            return None
        # This stands outside of the `except` block, whose traceback kept every tensor of the failed attempt.
        part = loss = None  # type: ignore[assignment]
        parts.drop()
        gradients.take(self._parameters)
        if state is not None:
            state.restore()
        self._meter.release()
        return failure
