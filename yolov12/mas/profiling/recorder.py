"""Observes a model while it runs, to profile its layers.

Bytes are read from the autograd graph and not from an allocator: in one forward pass, the recorder sees every tensor
that autograd saves, the layer that made it, and whether it could be rebuilt. The numbers are therefore exact on a GPU,
on the CPU, and with fake tensors on a machine that has neither. Temporary memory is the peak between the moments at
which gradients reach the layers.

A `Recorder` provides two contexts for two passes over the same few images, each forward and backward: first
`saved_tensors`, then `times_and_peaks`. `profile` combines what they saw with the time of whole passes under three
plans. Only the whole passes show what the hooks and the bookkeeping of checkpointing cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.checkpointing.checkpointing import Checkpointing
from yolov12.mas.checkpointing.rebuild import ACTIVATIONS, Outputs
from yolov12.mas.memory.reading import Stopwatch
from yolov12.mas.modules import each_tensor, overridden
from yolov12.mas.profiling.observations import Call, Peaks, Saved, Timer, WholePasses
from yolov12.mas.profiling.profile import LayerCost, Profile, Time

__all__ = ["Recorder"]

# About 10 ms, the time in which the host launches the largest layer.
_DELAY_CYCLES = 20_000_000
# Least factor by which a layer's own time is scaled, because times of whole passes are noisy.
_LEAST_FACTOR = 0.2


class Recorder:
    """Observes two passes of a model.

    Args:
        model: Model that the passes run.
        layers: Name → layer; outer layers come before the layers inside them, each in the order in which they run.
        checkpointing: Checkpointing of this model and these layers.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], checkpointing: Checkpointing) -> None:
        self._layers, self._checkpointing = layers, checkpointing
        self._shapes = {parameter.shape for parameter in model.parameters()}
        self._owned = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._inside = _nesting(layers)
        self._stages = [name for name, outer in self._inside.items() if outer is None]
        self.stack: list[str] = []
        """Layers that are running, outermost first."""
        self._calls: dict[str, Call] = {}
        self._saved: dict[int, Saved] = {}
        # Inputs and outputs of layers, kept allocated so that their addresses stay unique.
        self._alive: list[Tensor] = []
        self._rebuildable: dict[int, tuple[str, ...]] = {}
        self._held: set[int] = set()
        """Outputs that can be rebuilt and that the code of the model refers to when its last layer ends."""
        self._fixed: set[str] = set()
        """Layers that must keep everything, because their result depends on how often or in which order they run."""
        self._model = model
        self._norms_called: set[nn.Module] = set()
        self._device = next(model.parameters()).device
        self._forward: dict[str, Timer] = {}
        self._rebuilds: dict[str, Timer] = {}
        self._marks: list[tuple[int, int]] = []  # (stage, peak bytes before its gradient arrived)
        self._forward_peak_bytes = self._gradient_bytes = 0
        self.allocated_bytes = 0
        """Allocated bytes when the second pass began; its images are on the device then."""

    @contextmanager
    def saved_tensors(self, stopwatch: Callable[[], Stopwatch]) -> Iterator[None]:
        """Observe a forward pass: which tensors autograd saves, and how long it takes to rebuild those that can be.

        Args:
            stopwatch: Starts a stopwatch of the device.
        """
        outputs = _RecordedOutputs(self)
        run = partial(self._run_layer, outputs)
        with (
            self._checkpointing.apart(),
            self._checkpointing.remembering(outputs, lambda: True),
            torch.autograd.graph.saved_tensors_hooks(self._record_saved, lambda tensor: tensor),
            overridden({layer: partial(run, name, layer.forward) for name, layer in self._layers.items()}),
        ):
            versions = self._versions()
            yield
            self._fixed |= self._overwritten(versions)
        saved = {key: made for key, made in outputs.made.items() if key in self._saved}
        self._rebuildable = {key: layers for key, (layers, *_) in saved.items()}
        for name in self._layers:
            again = [output for layers, output, _ in saved.values() if name in layers]
            with self._timing(self._rebuilds, name, stopwatch):
                for output in reversed(again):  # in this order each activation leaves its input for the next
                    output.get()
        self._alive.clear()
        for each in self._saved.values():
            each.tensor = None

    def flexible(self) -> list[str]:
        """Return the outermost layers that may be rebuilt or recomputed. Valid after the first pass."""
        changeable = [name for name in self._stages if name not in self._fixed]
        return [name for name in changeable if not isinstance(self._layers[name], ACTIVATIONS)]

    @contextmanager
    def times_and_peaks(self, stopwatch: Callable[[], Stopwatch], meter: Peaks) -> Iterator[None]:
        """Observe a forward pass and the backward pass after it: times of layers, and peaks between gradients.

        Args:
            stopwatch: Starts a stopwatch of the device.
            meter: Reads the peaks.
        """
        self._marks.clear()
        self.allocated_bytes = meter.mark()
        for parameter in self._model.parameters():  # all from the start, so that every phase has the same gradients
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradient_bytes = meter.mark() - self.allocated_bytes

        def reached(stage: int, earlier: list[int], _: Tensor) -> None:
            if not earlier:  # the backward pass of a layer begins with the first gradient of any of its outputs
                self._marks.append((stage, meter.peak_bytes()))
                earlier.append(meter.mark())

        def call(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._timing(self._forward, name, stopwatch):
                result = forward(*args, **kwargs)
            if name in self._stages:
                hook = partial(reached, self._stages.index(name), [])
                each_tensor(result, lambda tensor: tensor.register_hook(hook) if tensor.requires_grad else None)
                if name == self._stages[-1]:
                    self._forward_peak_bytes = meter.peak_bytes()
                    meter.mark()
            return result

        calls = {layer: partial(call, name, layer.forward) for name, layer in self._layers.items()}
        with self._checkpointing.apart(), overridden(calls):
            yield

    @contextmanager
    def _timing(self, into: dict[str, Timer], name: str, stopwatch: Callable[[], Stopwatch]) -> Iterator[None]:
        if self._device.type == "cuda" and self._inside[name] is None:
            # The device sleeps first, so that the launches queue up and then run without gaps. The time measured is
            # then that of the device alone.
            with torch.cuda.device(self._device):
                torch.cuda._sleep(_DELAY_CYCLES)
        begin, watch = time.perf_counter(), stopwatch()
        yield
        watch.stop()
        into[name] = Timer(1e3 * (time.perf_counter() - begin), watch)

    def profile(self, images: int, whole: WholePasses, last_peak_bytes: int, beside_bytes: int = 0) -> Profile:
        """Combine the observations of both passes.

        Args:
            images: Number of images in each pass.
            whole: Times of passes without an observer.
            last_peak_bytes: Peak of the second pass since the last gradient reached a layer.
            beside_bytes: Bytes that so many images take in a run beside what the second pass allocated.
        """
        made_in = {key: self._stage_of(key, saved) for key, saved in self._saved.items()}
        layers = tuple(self._layer_cost(name, images, made_in) for name in self._layers if name in self._calls)
        stages = [layer for layer in layers if layer.inside is None]
        forward, loss, extra = self._extra_bytes(stages, images, last_peak_bytes, beside_bytes)
        # A backward pass takes about as long as two forward passes.
        device_ms = min(3 * sum(stage.recompute.device_ms for stage in stages), whole.keep_ms / images)
        total = Time(whole.keep_ms / images, device_ms or whole.keep_ms / images)
        flexible = set(self.flexible())
        rebuilt, recomputed = (
            (ms - whole.keep_ms) / images / (sum(times) or 1.0)
            for ms, times in (
                (whole.rebuild_ms, [stage.rebuild.host_ms for stage in stages if stage.name in flexible]),
                (whole.recompute_ms, [stage.recompute.host_ms for stage in stages if stage.name in flexible]),
            )
        )
        scaled = tuple(
            replace(layer, rebuild=_scaled(layer.rebuild, rebuilt), recompute=_scaled(layer.recompute, recomputed))
            for layer in layers
        )
        return Profile(scaled, forward, loss, extra, total)

    def _run_layer(
        self, outputs: _RecordedOutputs, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if name in self._calls:
            self._fixed.add(name)
        first = len(self._alive)
        call = self._calls[name] = Call(inputs=self._keep_alive((args, kwargs)))
        call.given = [(tensor, tensor._version) for tensor in self._alive[first:]]
        self.stack.append(name)
        try:
            result = forward(*args, **kwargs)
        finally:
            self.stack.pop()
        call.outputs = self._keep_alive(result)
        if name == self._stages[-1]:
            self._held = outputs.alive()
        return result

    def _versions(self) -> list[tuple[nn.Module, Tensor, int]]:
        """Return all buffers and their versions, except BatchNorm's: a grouped forward pass does not change those."""
        modules = (module for module in self._model.modules() if not isinstance(module, _BatchNorm))
        return [(module, buffer, buffer._version) for module in modules for buffer in module.buffers(recurse=False)]

    def _overwritten(self, versions: list[tuple[nn.Module, Tensor, int]]) -> set[str]:
        """Return layers that change a buffer, and layers whose inputs were overwritten during or after their call."""
        moved = {module for module, buffer, version in versions if buffer._version != version}
        found = {name for name, layer in self._layers.items() if moved & set(layer.modules())}
        for name, call in self._calls.items():
            if any(tensor._version != version for tensor, version in call.given):
                found.add(name)
            call.given.clear()
        return found

    def called_norm(self, layer: nn.Module) -> None:
        """Note a call of a BatchNorm. Only the last call's statistics are kept, so a second call fixes its layers."""
        if layer in self._norms_called:
            self._fixed |= {name for name, holder in self._layers.items() if layer in set(holder.modules())}
        self._norms_called.add(layer)

    def _keep_alive(self, nest: Any) -> dict[int, int]:
        first = len(self._alive)
        each_tensor(nest, lambda tensor: self._alive.append(tensor.detach()))
        return {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in self._alive[first:]}

    def _record_saved(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        key = _storage(tensor)
        # Weights are in memory anyway. So are their half-precision copies, until autocast ends.
        if key not in self._saved and key not in self._owned and tensor.shape not in self._shapes:
            size = tensor.untyped_storage().nbytes()
            self._saved[key] = Saved(size, tuple(self.stack), tensor)
        return tensor

    def _layer_cost(self, name: str, images: int, made_in: Mapping[int, int | None]) -> LayerCost:
        call, stage = self._calls[name], self._stages.index(self._outermost(name))
        own = {
            key
            for key, saved in self._saved.items()
            if key in call.outputs or (name in saved.layers and key not in call.inputs)
        }
        if self._inside[name] is None:  # an earlier layer made what this one passes on
            own = {key for key in own if made_in[key] == stage}
        freed = [key for key in own if key not in call.outputs]
        # A recomputed layer needs its inputs. If nothing else keeps an input, that memory is not freed: for example, a
        # tensor that the layer's first convolution converts to half precision.
        given = [size for key, size in call.inputs.items() if key not in self._saved and key not in self._owned]
        kept_input_bytes = sum(given) if freed else 0
        rebuilt = [key for key, layers in self._rebuildable.items() if name in layers]
        result = self._calls[self._stages[-1]].outputs if self._stages[-1] in self._calls else {}

        def per_image(keys: Sequence[int]) -> float:
            return sum(self._saved[key].bytes for key in keys) / images

        if name in self._fixed or isinstance(self._layers[name], ACTIVATIONS):
            freed, kept_input_bytes, rebuilt = [], 0, []
        return LayerCost(
            name=name,
            inside=self._inside[name],
            stage=stage,
            kept_bytes=per_image(list(own)),
            recompute_frees_bytes=per_image(freed) - kept_input_bytes / images,
            rebuild_frees_bytes=per_image(rebuilt),
            result_bytes=per_image([key for key in rebuilt if key in result]),
            held_bytes=per_image([key for key in rebuilt if key in self._held]),
            largest_rebuilt_bytes=max((per_image([key]) for key in rebuilt), default=0.0),
            recompute=self._time(self._forward, name, images),
            rebuild=self._time(self._rebuilds, name, images),
        )

    def _time(self, timers: Mapping[str, Timer], name: str, images: int) -> Time:
        """Return a layer's time. Inside an outermost layer, device time is divided in proportion to host time."""
        if name not in timers:
            return Time(0.0, 0.0)
        outer = timers[self._outermost(name)]
        device_ms = outer.watch.elapsed_ms() or 0.0
        return Time(timers[name].host_ms / images, device_ms * timers[name].host_ms / (outer.host_ms or 1.0) / images)

    def _stage_of(self, key: int, saved: Saved) -> int | None:
        for index, name in enumerate(self._stages):
            if name in self._calls and key in self._calls[name].outputs:
                return index
        return self._stages.index(saved.layers[0]) if saved.layers else None

    def _outermost(self, name: str) -> str:
        while (outer := self._inside[name]) is not None:
            name = outer
        return name

    def _extra_bytes(
        self, stages: Sequence[LayerCost], images: int, last_peak_bytes: int, beside_bytes: int
    ) -> tuple[float, float, tuple[float, ...]]:
        kept = {stage.stage: stage.kept_bytes for stage in stages}
        # When a gradient reaches a layer, the backward pass of the layers after it ends and its own begins.
        peaks: dict[int, int] = {}
        running = len(self._stages)
        for stage, peak in self._marks:
            peaks[running] = max(peaks.get(running, 0), peak)
            running = stage
        peaks[running] = max(peaks.get(running, 0), last_peak_bytes)

        def above(stage: int, peak_bytes: int) -> float:
            there = sum(size for index, size in kept.items() if index <= stage) * images
            return max(0.0, peak_bytes - self.allocated_bytes - self._gradient_bytes + beside_bytes - there) / images

        *extra, loss = (above(stage, peaks.get(stage, 0)) for stage in range(len(self._stages) + 1))
        return above(len(self._stages), self._forward_peak_bytes), loss, tuple(extra)


class _RecordedOutputs(Outputs):
    """Keeps all outputs, and records the layer in which each was made."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.made: dict[int, tuple[tuple[str, ...], Any, Tensor]] = {}

    def normalize(self, layer: nn.Module, out: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        self._recorder.called_norm(layer)
        super().normalize(layer, out, x, again)

    def add(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        super().add(tensor, again)
        self.made[_storage(tensor)] = tuple(self._recorder.stack), self.find(tensor), tensor.detach()

    def alive(self) -> set[int]:
        return {key for key, (tensor, *_) in self._by_storage.items() if tensor() is not None}


def _nesting(layers: Mapping[str, nn.Module]) -> dict[str, str | None]:
    inside: dict[str, str | None] = {}
    for name, layer in layers.items():
        holders = [outer for outer in inside if any(layer is part for part in layers[outer].modules())]
        inside[name] = holders[-1] if holders else None
    return inside


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _scaled(time: Time, factor: float) -> Time:
    """Return the time with its host part multiplied by `factor`, which makes the sum of layers match whole passes."""
    return replace(time, host_ms=time.host_ms * max(factor, _LEAST_FACTOR))
