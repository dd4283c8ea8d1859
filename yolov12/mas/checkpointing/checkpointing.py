"""Activation checkpointing: which layers keep what, switched for every micro-batch without touching the model.

A layer runs in one of three ways:

keep        everything its backward pass needs stays in memory
rebuild     outputs of BatchNorm and activation are made again from BatchNorm's input (rebuild.py): cheap
recompute   only its inputs stay, and its forward pass runs again (Chen, Xu, Zhang, Guestrin, 2016,
            https://arxiv.org/abs/1604.06174), by `torch.utils.checkpoint`

Gradients are the same whatever the plan. So are running statistics: a BatchNorm that runs again overwrites the row of
its group (batchnorm/grouped.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
    """What runs otherwise than kept."""

    modes: tuple[tuple[str, str], ...] = ()
    """(layer, `rebuild` or `recompute`). No layer may lie inside another one that is named."""

    def names(self, mode: str) -> tuple[str, ...]:
        """Layers that run in a mode."""
        return tuple(name for name, its in self.modes if its == mode)

    def __str__(self) -> str:
        """For the journal: `rebuild backbone.2 neck.5, recompute backbone.0`; empty if all is kept."""
        parts = [f"{mode} {' '.join(names)}" for mode in (REBUILD, RECOMPUTE) if (names := self.names(mode))]
        return ", ".join(parts)


KEEP_ALL = Plan()


class Checkpointing:
    """Runs a model's layers as plans say.

    Args:
        model: Its activations and the layers below; changed only inside `within`.
        layers: Name → layer. Each is called once in a forward pass.
        norms: Those of the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], norms: GroupedBatchNorm) -> None:
        self._layers, self._norms = layers, norms
        self._device = next(model.parameters()).device
        self._activations = [part for part in model.modules() if isinstance(part, ACTIVATIONS)]
        self._rebuilding = False

    @contextmanager
    def within(self, plan: Plan) -> Iterator[None]:
        """Run a forward pass, and then, outside, its backward pass."""
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

    @contextmanager
    def remembering(self, outputs: Outputs, wanted: Callable[[], bool]) -> Iterator[None]:
        """Enter into `outputs` what BatchNorm and activations make while it is wanted."""

        def activate(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return outputs.activate(function, x) if wanted() else function(x)

        def normalized(layer: nn.Module, out: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
            if wanted():
                outputs.normalize(layer, out, x, again)

        forwards: dict[nn.Module, Callable[..., Any]] = {
            module: partial(activate, module.forward)
            for module in self._activations
            if not getattr(module, "inplace", False)  # what it was given is gone, and who called it may count on that
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
            return forward(*args, **kwargs)
        finally:
            self._rebuilding = False

    def _recompute(self, outputs: Outputs, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept = each_tensor((args, kwargs), lambda tensor: _Input(outputs, tensor))
        first = [(args, kwargs)]

        def run(_: Tensor) -> Any:
            # The second time from what is left of the inputs, some of which may have to be made again first.
            again = not first
            args, kwargs = each_tensor(kept, _Input.get, _Input) if again else first.pop()
            result = forward(*args, **kwargs)
            if again:
                self._norms.forget_activated()
            return result

        # Its argument tells `checkpoint` whose random generators to remember.
        return checkpoint(run, torch.empty(0, device=self._device), use_reentrant=False)


class _Input:
    def __init__(self, outputs: Outputs, tensor: Tensor) -> None:
        self._value, self._needs_grad = outputs.keep(tensor), tensor.requires_grad
        self._tensor = None if outputs.find(tensor) else tensor.detach()  # which counts its versions with it
        self._version = tensor._version

    def get(self) -> Tensor:
        if self._tensor is not None and self._tensor._version != self._version:
            raise RuntimeError(
                "a layer cannot be recomputed, as what it was given was written on since: name it in disable_mas_layers"
            )
        return self._value().detach().requires_grad_(self._needs_grad)
