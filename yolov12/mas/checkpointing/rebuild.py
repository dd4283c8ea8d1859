"""Outputs of BatchNorm and of the activation after it, made again from BatchNorm's input when the backward pass asks.

A convolution, a BatchNorm and an activation keep three tensors of one size for the backward pass: what BatchNorm gets,
what the activation gets, and what the next convolution gets. The last two follow from the first by arithmetic on single
values, so making them again costs two passes over memory each and no convolution ("In-Place Activated BatchNorm", Rota
Bulò, Porzi, Kontschieder, 2018, https://arxiv.org/abs/1712.02616, keeps one of the three too, by inverting).

Autograd lets a saved tensor be replaced by something else (`saved_tensors_hooks`): here by how to make it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Outputs"]

ACTIVATIONS = (nn.SiLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU)
"""Whose backward pass asks for their input. One that asks for its output, as ReLU does, keeps a tensor less anyway."""


class _Output:
    """A tensor that can be made again."""

    def __init__(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        self._again = again
        self._size, self._stride = tensor.size(), tensor.stride()
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
                if value.stride() != self._stride:  # a view of it says where its values lie
                    value = value.new_empty_strided(self._size, self._stride).copy_(value)
            self._last = weakref.ref(value)
        if hold:
            self._held = value
        return value


class _View:
    """Part of an output, or all of it, as autograd had it."""

    def __init__(self, output: _Output, tensor: Tensor) -> None:
        self.output = output
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def get(self, hold: bool = False) -> Tensor:
        """Make it again; see `_Output.get`."""
        whole = self.output.get(hold)
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
        self._by_storage[key] = weakref.ref(tensor), tensor._version, _Output(tensor, again)

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
        source = self.pack(x)
        out = function(x)
        if isinstance(source, _View) and out.untyped_storage()._cdata != x.untyped_storage()._cdata:
            # The activation's own backward asks for its input next.
            self.add(out, lambda: function(source.get(hold=True)))
        return out

    def normalize(self, layer: nn.Module, out: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        """Remember what a BatchNorm made of `x`, be it with its activation."""
        source: Any = self.keep(x)
        self.add(out, lambda: again(source()))
