"""Outputs of BatchNorm and of the activation after it, made again from BatchNorm's input when the backward pass asks.

A convolution, a BatchNorm and an activation keep three tensors of one size for the backward pass: what BatchNorm gets,
what the activation gets, and what the next convolution gets. The last two follow from the first by arithmetic on single
values, so making them again costs two passes over memory each and no convolution ("In-Place Activated BatchNorm", Rota
Bulò, Porzi, Kontschieder, 2018, https://arxiv.org/abs/1712.02616, keeps one of the three too, by inverting).

Autograd lets a saved tensor be replaced by something else (`saved_tensors_hooks`): here by how to make it again.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Outputs", "out_of_place"]

ACTIVATIONS = (nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.Sigmoid)


def out_of_place(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation as a function that leaves its input alone."""
    calm: Any = copy.copy(activation)
    if getattr(calm, "inplace", False):
        calm.inplace = False
    forward: Callable[[Tensor], Tensor] = calm.forward
    return forward


class _Output:
    """A tensor that can be made again."""

    def __init__(self, again: Callable[[], Tensor]) -> None:
        self._again = again
        self._held: Tensor | None = None
        self._last: weakref.ref[Tensor] | None = None

    def get(self, hold: bool = False) -> Tensor:
        """Make the tensor, unless it still exists. With `hold`, it is kept for whoever asks next: once."""
        value, self._held = self._held, None
        if value is None and self._last is not None:
            value = self._last()
        if value is None:
            with torch.no_grad():
                value = self._again()
            self._last = weakref.ref(value)
        if hold:
            self._held = value
        return value


class _View:
    """Part of an output, or all of it, as autograd had it."""

    def __init__(self, output: _Output, tensor: Tensor) -> None:
        self.output = output
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def get(self) -> Tensor:
        whole = self.output.get()
        return whole if self.place == (whole.size(), whole.stride(), 0) else whole.as_strided(*self.place)


class Outputs:
    """Outputs of one forward pass that can be made again, found by the storage they lie in.

    An output that was written on since is not found, nor one whose memory something else has now.
    """

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[weakref.ref[Tensor], int, _Output]] = {}

    def add(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        """Remember an output, which must fill its storage from the start, and how to make it again."""
        key = tensor.untyped_storage()._cdata
        self._by_storage[key] = weakref.ref(tensor), tensor._version, _Output(again)

    def forget(self) -> None:
        """Find no more. What was packed holds what it needs, so that each goes when its own backward pass is done."""
        self._by_storage.clear()

    def find(self, tensor: Tensor) -> _Output | None:
        """The output that a tensor is, or is a view of."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        if found is None or found[0]() is None or found[1] != tensor._version:
            return None
        return found[2]

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """A way to the value of a tensor later, at as little memory as possible."""
        packed = self.pack(tensor)
        return packed.get if isinstance(packed, _View) else lambda: packed

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """For `saved_tensors_hooks`."""
        output = self.find(tensor)
        # Detached: a node that keeps its own output would keep itself.
        return tensor.detach() if output is None else _View(output, tensor)

    def unpack(self, packed: Tensor | _View) -> Tensor:
        """For `saved_tensors_hooks`."""
        return packed.get() if isinstance(packed, _View) else packed

    def activate(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an activation; its output can be made again if its input can."""
        out = function(x)
        source = self.find(x)
        if source is not None and out.untyped_storage()._cdata != x.untyped_storage()._cdata:
            # The activation's own backward asks for its input next.
            self.add(out, lambda: function(source.get(hold=True)))
        return out

    def normalize(self, out: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        """Remember what a BatchNorm made of `x`."""
        source: Any = self.keep(x)
        self.add(out, lambda: again(source()))
