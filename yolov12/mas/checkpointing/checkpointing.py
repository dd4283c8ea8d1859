"""Activation checkpointing: what each layer keeps for the backward pass, chosen anew for every micro-batch.

A layer runs in one of three modes:

keep        everything that its backward pass needs stays in memory
rebuild     outputs of BatchNorm and activation are computed again from BatchNorm's input (rebuild.py); this is cheap
recompute   only the layer's inputs stay, and its forward pass runs again (Chen, Xu, Zhang, Guestrin, 2016,
            https://arxiv.org/abs/1604.06174), by `torch.utils.checkpoint`

Gradients are the same under every plan. So are running statistics: a BatchNorm that runs again overwrites the row of
its group (batchnorm/grouped.py). The model itself is not changed, except while a forward pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.rebuild import ACTIVATIONS, Outputs
from yolov12.mas.modules import each_tensor, overridden

__all__ = ["KEEP_ALL", "REBUILD", "RECOMPUTE", "Checkpointing", "Plan"]

REBUILD, RECOMPUTE = "rebuild", "recompute"


@dataclass(frozen=True)
class Plan:
    """A checkpoint plan: the layers that do not keep everything."""

    modes: tuple[tuple[str, str], ...] = ()
    """Pairs of layer name and mode (`rebuild` or `recompute`). A named layer may not be inside another named layer."""

    def names(self, mode: str) -> tuple[str, ...]:
        """Return the names of the layers that run in a mode."""
        return tuple(name for name, its in self.modes if its == mode)

    def __str__(self) -> str:
        """Return the plan as the journal writes it: `rebuild neck.5, recompute backbone.0`; empty if all is kept."""
        parts = [f"{mode} {' '.join(names)}" for mode in (REBUILD, RECOMPUTE) if (names := self.names(mode))]
        return ", ".join(parts)


KEEP_ALL = Plan()
"""The plan in which every layer keeps everything."""


class Checkpointing:
    """Runs a model's layers according to plans.

    Args:
        model: Model with the layers. It is changed only inside `within` and `remembering`.
        layers: Name → layer. Each layer is called at most once in a forward pass.
        norms: BatchNorm layers of the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], norms: GroupedBatchNorm) -> None:
        self._layers, self._norms = layers, norms
        self._model, self._device = model, next(model.parameters()).device
        self._activations: list[nn.Module] = []
        self.find_activations()
        self._rebuilding = False

    def find_activations(self) -> None:
        """Look for the activations again, as modules of the model were replaced."""
        self._activations = [part for part in self._model.modules() if isinstance(part, ACTIVATIONS)]

    @contextmanager
    def within(self, plan: Plan) -> Iterator[None]:
        """Apply a plan to the forward pass in this context. The backward pass runs after the context has ended.

        Args:
            plan: Checkpoint plan; its names must be keys of `layers`.
        """
        if not plan.modes:
            yield
            return
        outputs = Outputs()
        with ExitStack() as stack:
            if plan.names(REBUILD):
                stack.enter_context(self.remembering(outputs, lambda: self._rebuilding))
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(outputs.pack, outputs.unpack))
            forwards: dict[nn.Module, Callable[..., Any]] = {}
            for name, mode in plan.modes:
                layer = self._layers[name]
                run = self._rebuild if mode == REBUILD else partial(self._recompute, outputs)
                forwards[layer] = partial(run, layer.forward)
            stack.enter_context(overridden(forwards))
            stack.callback(outputs.forget)
            yield

    def apart(self) -> AbstractContextManager[None]:
        """Return a context in which no BatchNorm joins with what follows it, see `GroupedBatchNorm.apart`."""
        return self._norms.apart()

    @contextmanager
    def remembering(self, outputs: Outputs, wanted: Callable[[], bool]) -> Iterator[None]:
        """Record in `outputs` what BatchNorm layers and activations compute.

        Args:
            outputs: Receives the outputs.
            wanted: Is called for each output and returns whether to record it.
        """

        def activate(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return outputs.activate(function, x) if wanted() else function(x)

        def normalized(layer: nn.Module, out: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
            if wanted():
                outputs.normalize(layer, out, x, again)

        forwards: dict[nn.Module, Callable[..., Any]] = {
            module: partial(activate, module.forward)
            for module in self._activations
            # An in-place activation overwrites its input, and its caller may rely on that.
            if not getattr(module, "inplace", False)
        }
        self._norms.listener = normalized
        try:
            with overridden(forwards):
                yield
        finally:
            self._norms.listener = None

    def _rebuild(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rebuilding = True
        try:
            with self._norms.apart():
                return forward(*args, **kwargs)
        finally:
            self._rebuilding = False

    def _recompute(self, outputs: Outputs, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept = each_tensor((args, kwargs), lambda tensor: _Input(outputs, tensor))
        first = [(args, kwargs)]

        def run(_: Tensor) -> Any:
            # The second run starts from what is left of the inputs. Some of them may have to be rebuilt first.
            again = not first
            args, kwargs = each_tensor(kept, _Input.get, _Input) if again else first.pop()
            result = forward(*args, **kwargs)
            if again:
                self._norms.forget_activated()
            return result

        # `checkpoint` saves the random state of the device that its argument is on. During a capture it cannot be read,
        # and the network is known to draw no random numbers.
        draws = self._device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
        return checkpoint(run, torch.empty(0, device=self._device), use_reentrant=False, preserve_rng_state=draws)


class _Input:
    def __init__(self, outputs: Outputs, tensor: Tensor) -> None:
        self._value, self._needs_grad = outputs.keep(tensor), tensor.requires_grad
        self._tensor = None if outputs.find(tensor) else tensor.detach()  # shares the version counter
        self._version = tensor._version

    def get(self) -> Tensor:
        if self._tensor is not None and self._tensor._version != self._version:
            raise RuntimeError(
                "a layer cannot be recomputed, as what it was given was written on since: name it in disable_mas_layers"
            )
        return self._value().detach().requires_grad_(self._needs_grad)
