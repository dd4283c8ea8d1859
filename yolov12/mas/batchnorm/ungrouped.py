"""BatchNorm layers that do not run in groups, as their forward pass is not PyTorch's own.

Such a layer normalises the micro-batch that it is given, as PyTorch would. What it writes to its buffers is a draft
until the batch is complete. So a run that fails, or that recomputes a layer, leaves no trace in the running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.modules import module_of, overridden

__all__ = ["UngroupedBatchNorm", "is_plain"]

_Buffers = dict[str, Tensor | None]


def is_plain(layer: _BatchNorm) -> bool:
    """Return whether the forward pass of a layer is that of PyTorch's BatchNorm."""
    forward = type(layer).forward
    return forward is _BatchNorm.forward and module_of(forward).startswith("torch.") and "forward" not in vars(layer)


class UngroupedBatchNorm:
    """Keeps what layers write to their buffers apart until it is certain.

    Args:
        model: Model with the layers.
        log: Called with a line for the user that names the layers, once.
    """

    def __init__(self, model: nn.Module, log: Callable[[str], None]) -> None:
        self._model, self._log = model, log
        self.layers: list[_BatchNorm] = []
        """The layers of this batch."""
        self._told: set[nn.Module] = set()
        self._drafts: dict[nn.Module, _Buffers] = {}

    def begin(self, layers: Sequence[_BatchNorm]) -> None:
        """Start a batch: drop the drafts of the previous one.

        Args:
            layers: The layers of the new batch.
        """
        self.layers = list(layers)
        self._drafts = {}
        new = {*layers} - self._told
        if new:
            names = [name for name, layer in self._model.named_modules() if layer in new]
            kinds = " and ".join(sorted({type(layer).__name__ for layer in new}))
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._log(
                f"memory: {names[0]}{more} ({kinds}) is not PyTorch's own BatchNorm: it normalises each micro-batch, "
                "so the gradient depends on how a batch is split"
            )
        self._told |= new

    @contextmanager
    def within(self) -> Iterator[None]:
        """Give the layers copies of their buffers while one micro-batch runs forward and backward."""
        own = {layer: layer._buffers for layer in self.layers}
        try:
            for layer, buffers in own.items():
                layer._buffers = _copy(self._drafts.get(layer, buffers))
            with overridden({layer: partial(_forward, layer, layer.forward) for layer in self.layers}):
                yield
            self._drafts = {layer: layer._buffers for layer in self.layers}
        finally:
            for layer, buffers in own.items():
                layer._buffers = buffers

    def commit(self) -> None:
        """Finish a batch: write the drafts to the layers."""
        for layer, draft in self._drafts.items():
            for name, value in draft.items():
                buffer = layer._buffers.get(name)
                if buffer is None or value is None:
                    layer._buffers[name] = value
                else:
                    buffer.copy_(value)


def _forward(layer: _BatchNorm, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch._C._current_graph_task_id() == -1:
        return forward(*args, **kwargs)
    draft = layer._buffers  # in a backward pass, a layer only repeats what it has done
    layer._buffers = _copy(draft)
    try:
        return forward(*args, **kwargs)
    finally:
        layer._buffers = draft


def _copy(buffers: _Buffers) -> _Buffers:
    return {name: None if value is None else value.clone() for name, value in buffers.items()}
