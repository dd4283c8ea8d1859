"""Traces the memory of one micro-batch on fake tensors, with the engine's own layers and checkpoint plans."""

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
from yolov12.mas.profiling.observations import WholePasses
from yolov12.mas.profiling.profile import Profile, Time
from yolov12.mas.profiling.recorder import Recorder
from yolov12.mas.profiling.solver import peak_bytes
from yolov12.mas.profiling.trace import ByteTrace
from yolov12.models.activations import activations
from yolov12.models.layer_names import layer_names
from yolov12.plan.cuda_rules import HALF, FusedBatchNorm, cuda_rules
from yolov12.plan.fake_model import FakeModel
from yolov12.plan.loss_bytes import LinearBytes, line_through, loss_bytes
from yolov12.plan.roofline import LayerTimes, Roofline

__all__ = ["IMAGES", "KeptAndPeak", "MicroBatchTracer"]

IMAGES = (8, 32)
"""Numbers of images that are traced to fit linear functions. With fewer, gradients may dominate the peak. On fake
tensors, more images take no longer."""

_REBUILDING = 0.2
"""Host time to rebuild BatchNorm and activation, relative to their first run. Rebuilding calls no module and records no
graph. The value was measured on the host of an H100."""


@dataclass(frozen=True)
class KeptAndPeak:
    """Bytes that a micro-batch adds, by its number of images."""

    kept: LinearBytes
    """Bytes after the forward pass."""
    peak: LinearBytes
    """Bytes at the peak."""


class MicroBatchTracer:
    """Runs micro-batches of a fake model and traces their memory.

    Args:
        fake_model: The model.
        imgsz: Height and width of the images in pixels.
        boxes: Boxes of the fullest image.
        amp: True for mixed precision.
        disabled: Names of layers without checkpointing, see `checkpointing.layers.candidates`.
    """

    def __init__(
        self, fake_model: FakeModel, imgsz: int, boxes: int, amp: bool = True, disabled: tuple[str, ...] = ()
    ) -> None:
        self._fake_model, self._imgsz, self._amp = fake_model, imgsz, amp
        self._layers = candidates(fake_model.model, layer_names(fake_model.model), disabled)
        self._norms = GroupedBatchNorm(fake_model.model, activations(fake_model.model), FusedBatchNorm())
        self._checkpointing = Checkpointing(fake_model.model, self._layers, self._norms)
        self._loss_bytes = loss_bytes(fake_model, imgsz, boxes, amp)
        self._traces: dict[tuple[Plan, int], tuple[int, int]] = {}
        self.half_weights_bytes = 0
        """Bytes of the weight copies that autocast keeps. Known after the first micro-batch."""

    def linear_bytes(self, plan: Plan = KEEP_ALL) -> KeptAndPeak:
        """Trace micro-batches of two sizes and fit linear functions.

        Args:
            plan: The checkpoint plan.

        Returns:
            Kept and peak bytes by number of images.
        """
        traces = {images: self.trace(images, plan) for images in IMAGES}
        kept, peak = (line_through({images: trace[index] for images, trace in traces.items()}) for index in (0, 1))
        return KeptAndPeak(kept, peak)

    def trace(self, images: int, plan: Plan = KEEP_ALL) -> tuple[int, int]:
        """Trace one micro-batch.

        Args:
            images: Images in the micro-batch.
            plan: The checkpoint plan.

        Returns:
            Bytes that the micro-batch adds: kept after the forward pass, and at the peak.
        """
        if (plan, images) not in self._traces:
            with self._fake_model.mode, ByteTrace() as trace:
                kept_bytes = self._run(images, self._checkpointing.within(plan), lambda: trace.allocated_bytes)
                self._traces[plan, images] = kept_bytes, trace.peak_bytes()
        return self._traces[plan, images]

    def profile(self, roofline: Roofline) -> Profile:
        """Profile the layers like the engine does, with estimated times.

        Args:
            roofline: Estimates the times of the GPU.

        Returns:
            Bytes and milliseconds per image of each layer and of the whole model.
        """
        recorder = Recorder(self._fake_model.model, self._layers, self._checkpointing)
        images, no_watch = IMAGES[1], partial(ClockStopwatch, lambda: 0.0)
        with self._fake_model.mode, ByteTrace() as trace:
            self._run(images, recorder.saved_tensors(no_watch))
            self._run(images, recorder.times_and_peaks(no_watch, trace))
            # The copies of weights do not grow with the images; the images of the next micro-batch do.
            beside_bytes = _pixels(images, self._imgsz).nbytes - self.half_weights_bytes
            found = recorder.profile(images, WholePasses(1.0, 1.0, 1.0), trace.peak_bytes(), beside_bytes)
        times = self._times(roofline, images)
        # With as many images as the profile, so that both have the same bytes that do not grow with the images.
        keep_bytes = (self.trace(images)[1] - self.half_weights_bytes) / images

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
            # A backward pass takes about twice the time of a forward pass.
            total=Time(3 * of_image(times.whole[""]).host_ms, 3 * of_image(times.whole[""]).device_ms),
            joined_bytes=max(peak_bytes(found, KEEP_ALL) - keep_bytes, 0.0),
        )

    def _times(self, roofline: Roofline, images: int) -> LayerTimes:
        """Estimate a forward pass: the whole model, named "", its layers, and their BatchNorms and activations."""
        model: nn.Module = self._fake_model.model
        cheap = [part for part in model.modules() if isinstance(part, (_BatchNorm, *ACTIVATIONS))]
        times = LayerTimes()
        timing = roofline.timing({"": model, **self._layers}, cheap, times)
        with self._fake_model.mode, roofline, cuda_rules(self._amp), timing:
            model(_pixels(images, self._imgsz).float())
        return times

    def _run(self, images: int, around: AbstractContextManager[None], measure: Callable[[], int] = lambda: 0) -> int:
        """Run a micro-batch like step.py. Returns what `measure` returns between forward and backward pass."""
        model: nn.Module = self._fake_model.model
        self._norms.begin()
        with cuda_rules(self._amp) as rules, self._norms.within((images,), 0):
            ahead = _pixels(images, self._imgsz)  # the engine prefetches the next micro-batch
            with around:
                image = _image(images, self._imgsz, amp=self._amp)
                loss = _forward(model, image, self._loss_bytes(images))
            measured = measure()
            # Not `loss.backward()`: PyTorch disables function modes inside it, and recomputed layers need `cuda_rules`.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
            self.half_weights_bytes = rules.copies_bytes
        del ahead, image
        for parameter in model.parameters():
            parameter.grad = None
        return measured


def _pixels(images: int, imgsz: int) -> Tensor:
    return torch.empty(images, 3, imgsz, imgsz, dtype=torch.uint8)


def _image(images: int, imgsz: int, *, amp: bool) -> Tensor:
    """Make the input of the model as `training.adapter.images` does, which replaces the pixels in the batch."""
    pixels = _pixels(images, imgsz)
    return pixels.to(HALF, memory_format=torch.channels_last) if amp else pixels.float() / 255


def _forward(model: nn.Module, image: Tensor, loss_peak_bytes: int) -> Tensor:
    predictions = model(image)
    loss: Tensor = _Loss.apply(predictions["boxes"], predictions["scores"], loss_peak_bytes)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    """Allocates the peak bytes of the loss and returns gradients of the right shapes."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, peak_bytes: int) -> Tensor:
        ctx.like = tuple((each.shape, each.dtype, each.device) for each in (boxes, scores))
        torch.empty(peak_bytes, dtype=torch.uint8, device=boxes.device)
        return boxes.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like), None
