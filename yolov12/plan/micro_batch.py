"""One micro-batch, forward and backward, in shapes only: the engine's own layers and plans, followed byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, Checkpointing, Plan
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.checkpointing.rebuild import ACTIVATIONS
from yolov12.mas.memory.reading import ClockStopwatch
from yolov12.mas.profiling.profile import Profile, Time
from yolov12.mas.profiling.recorder import Recorder, WholePasses
from yolov12.mas.profiling.trace import ByteTrace
from yolov12.models.activations import activations
from yolov12.models.layer_names import layer_names
from yolov12.plan.cuda_rules import FusedBatchNorm, cuda_rules
from yolov12.plan.loss import Line, loss_bytes, through
from yolov12.plan.network import Network
from yolov12.plan.roofline import Roofline, Times

__all__ = ["IMAGES", "Lines", "MicroBatch"]

IMAGES = (8, 32)
"""That lines are drawn through. In shapes only, many take as long as few, but of few the gradients may be the peak."""

_REBUILDING = 0.2
"""Host's time of an operation that is done again without modules and graph, relative to one with them; on an H100's."""


@dataclass(frozen=True)
class Lines:
    """Bytes of a micro-batch by its images, above what is live before it."""

    kept: Line
    """When the forward pass is done."""
    peak: Line


class MicroBatch:
    """Runs micro-batches of a model that exists in shapes only.

    Args:
        network: The model.
        imgsz: Height and width of images.
        boxes: In the image that has most.
        amp: Whether autocast is on.
        disabled: See `checkpointing.layers.candidates`.
    """

    def __init__(
        self, network: Network, imgsz: int, boxes: int, amp: bool = True, disabled: tuple[str, ...] = ()
    ) -> None:
        self._network, self._imgsz, self._amp = network, imgsz, amp
        self._layers = candidates(network.model, layer_names(network.model), disabled)
        self._norms = GroupedBatchNorm(network.model, activations(network.model), FusedBatchNorm())
        self._checkpointing = Checkpointing(network.model, self._layers, self._norms)
        self._loss_bytes = loss_bytes(network, imgsz, boxes, amp)
        self._traces: dict[tuple[Plan, int], tuple[int, int]] = {}
        self.half_weights_bytes = 0
        """Copies of weights that autocast keeps; known when a micro-batch has run."""

    def lines(self, plan: Plan = KEEP_ALL) -> Lines:
        """Trace micro-batches of two sizes under a plan."""
        traces = {images: self.trace(images, plan) for images in IMAGES}
        kept, peak = (through({images: trace[index] for images, trace in traces.items()}) for index in (0, 1))
        return Lines(kept, peak)

    def trace(self, images: int, plan: Plan = KEEP_ALL) -> tuple[int, int]:
        """Follow one micro-batch, all of its images; bytes kept after the forward pass, and at the peak."""
        if (plan, images) not in self._traces:
            with self._network.mode, ByteTrace() as trace:
                kept_bytes = self._run(images, self._checkpointing.within(plan), lambda: trace.live_bytes)
                self._traces[plan, images] = kept_bytes, trace.peak_bytes()
        return self._traces[plan, images]

    def profile(self, roofline: Roofline) -> Profile:
        """What each layer costs, as the engine has it; the milliseconds are those of a card that is not there."""
        recorder = Recorder(self._network.model, self._layers, self._checkpointing)
        images, no_watch = IMAGES[0], partial(ClockStopwatch, lambda: 0.0)
        with self._network.mode, _Highest() as trace:
            self._run(images, recorder.saved_tensors(no_watch))
            held_bytes = trace.highest_bytes = trace.mark()  # what the recorder has seen it holds
            around = recorder.times_and_peaks(no_watch, trace)
            kept_bytes = self._run(images, around, lambda: trace.live_bytes)
            found = recorder.profile(images, WholePasses(1.0, 1.0, 1.0), trace.peak_bytes())
            trace.mark()
            # It was a plain pass, too.
            self._traces[KEEP_ALL, images] = kept_bytes - held_bytes, trace.highest_bytes - held_bytes
        times = self._times(roofline, images)

        def of_image(time: Time, factor: float = 1.0) -> Time:
            return Time(factor * time.host_ms / images, time.device_ms / images)

        return replace(
            found,
            layers=tuple(
                replace(
                    layer,
                    recompute=of_image(times.whole[layer.name]),
                    rebuild=of_image(times.cheap.get(layer.name, Time(0.0, 0.0)), _REBUILDING),
                )
                for layer in found.layers
            ),
            # A backward pass is two forward passes' work.
            total=Time(3 * of_image(times.whole[""]).host_ms, 3 * of_image(times.whole[""]).device_ms),
        )

    def _times(self, roofline: Roofline, images: int) -> Times:
        """Of a forward pass: the whole model as "", its layers, and BatchNorm and activations in them."""
        model: nn.Module = self._network.model
        cheap = [part for part in model.modules() if isinstance(part, (_BatchNorm, *ACTIVATIONS))]
        times = Times()
        timing = roofline.timing({"": model, **self._layers}, cheap, times)
        with self._network.mode, roofline, cuda_rules(self._amp), timing:
            model(_pixels(images, self._imgsz).float())
        return times

    def _run(self, images: int, around: AbstractContextManager[None], measure: Callable[[], int] = lambda: 0) -> int:
        """As step.py runs a micro-batch; what `measure` gives between forward and backward pass."""
        model: nn.Module = self._network.model
        self._norms.begin()
        with cuda_rules(self._amp) as rules, self._norms.within((images,), 0):
            ahead = _pixels(images, self._imgsz)  # the next micro-batch comes while this one computes
            image = _pixels(images, self._imgsz).float() / 255  # stays in the batch, in place of the pixels
            with around:
                loss = _forward(model, image, self._loss_bytes(images))
            measured = measure()
            # Past `backward`, for which the mode would be off: it is a function of its own, which recomputes others.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
            self.half_weights_bytes = rules.copies_bytes
        del ahead, image
        for parameter in model.parameters():
            parameter.grad = None
        return measured


class _Highest(ByteTrace):
    """Remembers the highest peak over all marks."""

    highest_bytes = 0

    def mark(self) -> int:
        self.highest_bytes = max(self.highest_bytes, self.peak_bytes())
        return super().mark()


def _pixels(images: int, imgsz: int) -> Tensor:
    return torch.empty(images, 3, imgsz, imgsz, dtype=torch.uint8)


def _forward(model: nn.Module, image: Tensor, loss_peak_bytes: int) -> Tensor:
    predictions = model(image)
    loss: Tensor = _Loss.apply(predictions["boxes"], predictions["scores"], loss_peak_bytes)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    """Takes the bytes of the loss, and gives gradients."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, peak_bytes: int) -> Tensor:
        ctx.like = tuple((each.shape, each.dtype, each.device) for each in (boxes, scores))
        torch.empty(peak_bytes, dtype=torch.uint8, device=boxes.device)
        return boxes.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like), None
