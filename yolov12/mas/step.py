"""Forward and backward of a logical batch in micro-batches, as transactions: each is done, or never was.

The gradient is that of the whole batch at once, however it was cut and whatever failed on the way:

- a loss is numerator / normaliser, both sums over images, and the normaliser of the batch (for detection the sum of
  target scores) is known only after its last micro-batch. So numerators are differentiated, divided by a first guess
  that keeps half precision in range, and the gradient is multiplied by guess / normaliser at the end;
- BatchNorm sees fixed groups of images (normalize.py);
- a micro-batch computes its gradient on its own, and it is added when it is complete. A failed allocation costs the
  micro-batch it hit: its gradient is dropped, the random generators are set back, and what is left runs again, smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from yolov12.mas import gradients
from yolov12.mas.failures import is_out_of_memory
from yolov12.mas.feed import Feed
from yolov12.mas.meter import Meter
from yolov12.mas.normalize import GroupedBatchNorm
from yolov12.mas.task import Loss, Task

__all__ = ["Failure", "Planner", "Result", "Step"]


@dataclass(frozen=True)
class Failure:
    """An allocation that failed."""

    images: int
    """Of the micro-batch it hit."""
    message: str
    peak_bytes: int
    """Of live bytes, until it failed."""


class Planner(Protocol):
    """Decides how a batch is cut, and is told how it went."""

    def plan(self, start: int, failure: Failure | None) -> list[tuple[int, ...]]:
        """Cut the images from `start` on: for each micro-batch, the sizes of its BatchNorm groups.

        Args:
            start: Images that are done.
            failure: What stopped the last plan.

        Raises:
            DoesNotFitError: There is no smaller cut left to try.
        """

    def done(self, start: int, stop: int, live_bytes: int, peak_bytes: int) -> None:
        """Learn what images `start` to `stop` took: live before them, and at their peak."""


@dataclass(frozen=True)
class Result:
    """A batch that was run. Its gradient is on the parameters, added to what was there."""

    loss: Tensor
    """Of the whole batch, the shape of `Loss.value`; on the device, detached."""
    items: Mapping[str, Tensor]
    """Of the whole batch."""
    micro_batches: tuple[int, ...]
    """Images in each, in the order they ran."""


class Step:
    """Runs batches of one model.

    Args:
        model: Has its parameters on one device.
        task: Cuts batches and computes their loss.
        meter: Of that device.
        backward: Differentiates a scalar; scales it first if half precision needs that.
    """

    def __init__(self, model: nn.Module, task: Task, meter: Meter, backward: Callable[[Tensor], None]) -> None:
        self._model, self._task, self._meter, self._backward = model, task, meter, backward
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self._norms = GroupedBatchNorm(model)

    def run(self, batch: Any, images: int, planner: Planner) -> Result:
        """Run a batch, forward and backward.

        Args:
            batch: On the host.
            images: How many are in it.
            planner: See `Planner`.

        Raises:
            DoesNotFitError: From the planner. Gradients and running statistics are as before.
        """
        before, state = gradients.take(self._parameters), _RandomState(self._device)
        total = _Total(images, self._task.floor)
        feed = Feed(self._device, lambda start, stop: self._task.part(batch, start, stop))
        self._norms.begin()
        ran: list[int] = []
        groups_done: list[int] = []
        start, failure = 0, None
        try:
            while start < images:
                plan = planner.plan(start, failure)
                failure = None
                for index, groups in enumerate(plan):
                    stop = start + sum(groups)
                    following = stop + sum(plan[index + 1]) if index + 1 < len(plan) else stop
                    live_bytes = self._meter.mark()
                    failure = self._attempt(feed, (start, stop, following), groups, len(groups_done), total)
                    if failure is not None:
                        break
                    planner.done(start, stop, live_bytes, self._meter.peak_bytes())
                    groups_done += groups
                    ran.append(stop - start)
                    start = stop
        except BaseException:
            gradients.give(self._parameters, before)
            state.restore()
            raise
        self._norms.commit(groups_done)
        gradients.give(self._parameters, gradients.add(before, total.finished_gradients()))
        return Result(total.loss(), total.items(), tuple(ran))

    def rehearse(self, batch: Any, start: int, stop: int) -> tuple[int, int] | Failure:
        """Run images `start` to `stop` of a batch and forget everything but what it took.

        Returns:
            Live bytes before it and at its peak, or the failure.
        """
        before = gradients.take(self._parameters)
        feed = Feed(self._device, lambda first, last: self._task.part(batch, first, last))
        state = _RandomState(self._device)
        self._norms.begin()
        try:
            live_bytes = self._meter.mark()
            failure = self._attempt(feed, (start, stop, stop), (stop - start,), 0, _Total(stop, self._task.floor))
            return failure or (live_bytes, self._meter.peak_bytes())
        finally:
            state.restore()
            gradients.give(self._parameters, before)

    def _attempt(
        self, feed: Feed, span: tuple[int, int, int], groups: tuple[int, ...], first_group: int, total: _Total
    ) -> Failure | None:
        start, stop, following = span
        state = _RandomState(self._device)
        try:
            part = feed.get(start, stop)
            if following > stop:
                feed.look_ahead(stop, following)
            with self._norms.within(groups, first_group):
                loss = self._task.loss(self._model, part)
                with torch.autocast(self._device.type, enabled=False):  # a backward pass has the dtypes of its forward
                    self._backward(total.scaled(loss, stop - start))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = Failure(stop - start, str(error), self._meter.peak_bytes())
        else:
            total.add(loss, gradients.take(self._parameters))
            return None
        # Out of the `except` block: the traceback held every tensor of the failed attempt.
        part = loss = None  # type: ignore[assignment]
        feed.drop()
        gradients.take(self._parameters)
        state.restore()
        self._meter.release()
        return failure


class _Total:
    """Adds up numerators and normalisers, and divides once."""

    def __init__(self, images: int, floor: float) -> None:
        self._images, self._floor = images, floor
        self._guess: Tensor | None = None
        self._gradients: gradients.Gradients | None = None
        self._parts: list[tuple[Tensor, Tensor, Mapping[str, Tensor]]] = []

    def scaled(self, loss: Loss, images: int) -> Tensor:
        """The part's numerator over the guess of the batch's normaliser."""
        normaliser = self._as_tensor(loss)
        if not self._parts and images == self._images:
            self._guess = normaliser.clamp(min=self._floor)  # no guess: the factor below is exactly 1
        elif not self._parts:  # also after a failure: what ran then may have been of another size
            # A power of two, so that scaling back at the end is exact.
            expected = (normaliser * (self._images / images)).clamp(min=max(self._floor, 1e-6))
            self._guess = torch.exp2(torch.log2(expected).round())
        return loss.value.sum() * (normaliser.clamp(min=self._floor) / self._guess)

    def add(self, loss: Loss, new: gradients.Gradients) -> None:
        """Take in a part that is done."""
        self._gradients = new if self._gradients is None else gradients.add(self._gradients, new)
        items = {name: item.detach() for name, item in loss.items.items()}
        self._parts.append((self._as_tensor(loss), loss.value.detach(), items))

    def finished_gradients(self) -> gradients.Gradients:
        """Gradients of the batch's loss."""
        assert self._gradients is not None
        assert self._guess is not None
        if len(self._parts) > 1:
            gradients.scale(self._gradients, self._guess / self._normaliser())
        return self._gradients

    def loss(self) -> Tensor:
        """The batch's loss."""
        return self._combined([value for _, value, _ in self._parts])

    def items(self) -> dict[str, Tensor]:
        """The batch's items."""
        return {name: self._combined([items[name] for *_, items in self._parts]) for name in self._parts[0][2]}

    def _combined(self, values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        shares = [normaliser.clamp(min=self._floor) / self._normaliser() for normaliser, *_ in self._parts]
        return sum((value * share for value, share in zip(values, shares, strict=True)), torch.zeros_like(values[0]))

    def _normaliser(self) -> Tensor:
        return torch.stack([normaliser for normaliser, *_ in self._parts]).sum().clamp(min=self._floor)

    @staticmethod
    def _as_tensor(loss: Loss) -> Tensor:
        if isinstance(loss.normaliser, Tensor):
            return loss.normaliser.detach()
        return torch.full((), float(loss.normaliser), device=loss.value.device)  # filled there: a copy would wait


class _RandomState:
    """Generators of the host and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
