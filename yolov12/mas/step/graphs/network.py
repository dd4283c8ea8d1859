"""A network whose forward and backward pass were captured as two graphs, and which is used like a function.

Input, outputs and gradients have fixed places in memory. A pass copies its input there, replays the forward graph, and
hands out the outputs; the backward pass does the same with their gradients. Between the two runs the loss.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov12.mas.batchnorm.statistics import Statistics
from yolov12.mas.memory.reading import Meter
from yolov12.mas.modules import each_tensor
from yolov12.mas.step.graphs.leaves import Leaves
from yolov12.mas.step.graphs.recorder import Recorder, Tensors
from yolov12.mas.step.snapshots import RandomState

__all__ = ["Around", "Example", "GraphedNetwork", "NotReplayableError", "reason_of", "tensors_in", "watched"]

_PLAIN = (str, int, float, bool, type(None))
_OFF = 0.02
"""Largest relative difference of a replay from the pass before the capture. Half precision and sums in another order
give 1e-3; anything that was not captured gives 1."""

_FUNCTIONS = 4
"""Most functions that a message names."""


class NotReplayableError(Exception):
    """A network cannot be captured, or a pass is not the one that was captured."""


@dataclass(frozen=True)
class Around:
    """Contexts in which a network runs."""

    passes: Callable[[], AbstractContextManager[None]]
    """Context of forward and backward pass, such as the grouped BatchNorm."""
    forward: Callable[[], AbstractContextManager[None]]
    """Context of the forward pass, such as a checkpoint plan."""
    drafts: Statistics
    """Receives the statistics of BatchNorm."""


class Example(NamedTuple):
    """Form of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Example:
        """Return the form of a tensor; a dense one for a tensor whose values share memory."""
        shared = any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        strides = torch.empty_like(tensor, device="meta").stride() if shared else tensor.stride()
        return cls(tensor.shape, strides, tensor.dtype, tensor.device)

    def make(self, scale: float = 1.0) -> Tensor:
        """Make a tensor of this form with values from -scale to scale; of zeros if it has integers."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            if not made.dtype.is_floating_point:
                return made.zero_()
            part = self.shape[1:]  # of one image, as a pattern for all takes much memory
            values = torch.arange(part.numel(), device=self.device, dtype=torch.float32) % 31 / 15 - 1
            return made.copy_((values * scale).reshape(part))


class GraphedNetwork:
    """Captures a network when it is made.

    Args:
        network: Forward pass of the model.
        around: Contexts of its passes; inside of them, the model uses the leaves.
        example: Form of its input.
        leaves: Parameters that get gradients, and what stands for them in the capture.
        wanted: Index of each output tensor that gets a gradient from the loss → form of the gradient. In another form,
            sums over it would be rounded differently.
        recorder: Records the passes.
        meter: Meter of the device.

    Raises:
        NotReplayableError: The network draws random numbers, its outputs are not tensors in plain containers, it uses
            other parameters than the leaves, or a replay differs.
        RuntimeError: The network cannot be captured, or there is not enough memory.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        around: Around,
        example: Example,
        leaves: Leaves,
        wanted: Mapping[int, Example],
        recorder: Recorder,
        meter: Meter,
    ) -> None:
        self._network, self._around, self._leaves = network, around, leaves
        self.drafts, self.wanted, self._device = around.drafts, sorted(wanted), example.device
        self.differentiable: list[bool] = []
        """For each output tensor, whether it depends on the parameters."""
        self._x, self._tree = example.make(), None
        self._live: list[Tensor] = []  # outputs with their autograd graph, between forward and backward pass
        self._grads: list[Tensor] = []
        state = RandomState(self._device)
        try:
            with recorder.apart():
                outputs = self._forward()
                self._grads = [wanted[index].make(1 / 64) for index in self.wanted]
                gradients = self._backward()
            if not state.is_current():
                raise NotReplayableError("it draws random numbers")
        finally:
            state.restore()
        expected: tuple[Tensors, ...] = (list(outputs), gradients, [self.drafts.means.clone()])
        meter.release(thorough=False)  # what the passes above used, which the pool cannot use
        allocated_bytes, unused_bytes = meter.mark(), _unused_bytes(meter)
        self._outputs, self._replay_forward = recorder.record(self._forward)
        self.kept_bytes = meter.mark() - allocated_bytes
        """Bytes that the outputs and the backward pass need while the loss runs."""
        self._gradients, self._replay_backward = recorder.record(self._backward)
        self.idle_bytes = max(_unused_bytes(meter) - unused_bytes, 0)
        """Bytes of the pool that count as reserved, not as allocated."""
        self.static_bytes = max(meter.mark() - allocated_bytes, 0) + sum(
            each.nbytes for each in (self._x, *self._grads)
        )
        """Bytes that count as allocated as long as the graphs are there."""
        found: tuple[Tensors, ...] = (list(self.outputs(self._x)), self.gradients(self._grads), [self.drafts.means])
        if any(_difference(a, b) > _OFF for a, b in zip(found, expected, strict=True)):
            raise NotReplayableError("a replay differs")

    def __call__(self, x: Tensor) -> Any:
        """Run the forward pass in place of the network.

        Args:
            x: Input of the network, of the form of the example.

        Returns:
            Outputs of the network. The next pass overwrites them, and the gradients that their backward pass gives to
            the parameters.
        """
        with_graph = iter(_Replay.apply(self, x, *self._leaves.parameters))  # type: ignore[no-untyped-call]
        flat = iter(
            [
                next(with_graph) if differentiable else out
                for out, differentiable in zip(self._outputs, self.differentiable, strict=True)
            ]
        )
        return each_tensor(self._tree, lambda _: next(flat))

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Replay the forward pass; return the output tensors in order, detached."""
        if x is not self._x:
            self._x.copy_(x)
        self._replay_forward()
        return self._outputs

    def gradients(self, grads: list[Tensor]) -> Tensors:
        """Replay the backward pass.

        Args:
            grads: Gradient of each output in `wanted`, in this order.

        Returns:
            Gradients of the parameters; None for one that has no part in these outputs.
        """
        if grads is not self._grads:
            torch._foreach_copy_(self._grads, grads)
        self._replay_backward()
        return self._gradients

    def _forward(self) -> list[Tensor]:
        self.drafts.clear()  # of NaN, for example, which a momentum of 1 would keep
        with self._around.passes(), self._around.forward(), torch.enable_grad(), _without_weight_cache():
            tree = self._network(self._x)
        self._live = tensors_in(tree)
        self.differentiable = [each.requires_grad for each in self._live]
        self._tree = each_tensor(tree, Tensor.detach)
        return [each.detach() for each in self._live]

    def _backward(self) -> Tensors:
        live, self._live = self._live, []
        # A backward pass uses the dtypes of its forward pass.
        with self._around.passes(), torch.autocast(self._device.type, enabled=False):
            wanted = [live[index] for index in self.wanted]
            leaves, parameters = self._leaves.leaves, self._leaves.parameters
            found = torch.autograd.grad(wanted, [*leaves, *parameters], self._grads, allow_unused=True)
        if any(gradient is not None for gradient in found[len(leaves) :]):
            raise NotReplayableError("a layer has parameters that PyTorch does not list")
        return list(found[: len(leaves)])


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, network: GraphedNetwork, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.network = network
        ctx.set_materialize_grads(False)
        outputs = zip(network.outputs(x), network.differentiable, strict=True)
        return tuple(out.detach() for out, differentiable in outputs if differentiable)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        network: GraphedNetwork = ctx.network
        if torch.is_grad_enabled():
            raise RuntimeError("a replayed network cannot be differentiated twice")
        indices = (index for index, differentiable in enumerate(network.differentiable) if differentiable)
        given = {index: grad for index, grad in zip(indices, grads, strict=True) if grad is not None}
        if sorted(given) != network.wanted:
            raise NotReplayableError("other outputs get gradients than when it was captured")
        found = network.gradients([given[index] for index in network.wanted])
        # Detached, so that autograd takes them for gradients as they are, and does not copy each.
        return None, None, *(None if each is None else each.detach() for each in found)


def reason_of(error: Exception) -> str:
    """Return what an error says in its first line, and the functions in which it was raised, the innermost first."""
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)][: -_FUNCTIONS - 1 : -1]
    return f"{told} (in {' < '.join(functions)})"


def tensors_in(nest: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dictionaries in order.

    Raises:
        NotReplayableError: There are other objects, which may hold tensors as well.
    """
    if type(nest) is Tensor:
        return [nest]
    if isinstance(nest, _PLAIN):
        return []
    if type(nest) not in (list, tuple, dict):
        raise NotReplayableError(f"its outputs hold a {type(nest).__name__}")
    return [tensor for part in (nest.values() if type(nest) is dict else nest) for tensor in tensors_in(part)]


def watched(nest: Any, seen: dict[int, Example], after_loss: Callable[[], None] = lambda: None) -> Any:
    """Return outputs of a network that note which of their tensors get gradients from the loss.

    Args:
        nest: Outputs of the network, see `tensors_in`.
        seen: Receives the indices of these tensors and the forms of their gradients in the backward pass.
        after_loss: Called when the backward pass of the loss has ended and that of the network begins.

    Raises:
        NotReplayableError: There are other objects than tensors, which may hold tensors as well.
    """
    tensors = tensors_in(nest)
    chosen = [index for index, each in enumerate(tensors) if each.requires_grad]
    if chosen:
        found = _Watch.apply(seen, after_loss, chosen, *(tensors[i] for i in chosen))  # type: ignore[no-untyped-call]
        for index, each in zip(chosen, found, strict=True):
            tensors[index] = each
    rest = iter(tensors)
    return each_tensor(nest, lambda _: next(rest))


class _Watch(torch.autograd.Function):
    """Passes tensors on, and notes which of them get gradients.

    A hook on a tensor would also see the gradient from other outputs that are computed of it.
    """

    @staticmethod
    def forward(
        ctx: Any, seen: dict[int, Example], after_loss: Callable[[], None], indices: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.seen, ctx.after_loss, ctx.indices = seen, after_loss, indices
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ((index, grad) for index, grad in zip(ctx.indices, grads, strict=True) if grad is not None)
        ctx.seen.update((index, Example.of(grad)) for index, grad in found)
        ctx.after_loss()
        return None, None, None, *grads


@contextmanager
def _without_weight_cache() -> Iterator[None]:
    """Convert weights to half precision anew: copies of an earlier pass may be gone when a graph is replayed."""
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches)


def _unused_bytes(meter: Meter) -> int:
    reading = meter.read()
    return reading.reserved_bytes - reading.allocated_bytes


def _difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the relative difference of two lists of tensors."""
    if [each is None for each in found] != [each is None for each in expected]:
        return float("inf")
    off = size = 0.0
    for a, b in zip(found, expected, strict=True):
        if a is not None and b is not None:
            off += float((a.double() - b.double()).nan_to_num().square().sum())
            size += float(b.double().nan_to_num().square().sum())
    return float((off / size) ** 0.5) if size else off
