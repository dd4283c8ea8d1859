"""Outputs of BatchNorm and activation that are computed again from BatchNorm's input during the backward pass.

A convolution, a BatchNorm and an activation keep three tensors of the same size for the backward pass: the inputs of
BatchNorm, of the activation and of the next convolution. The last two follow from the first by elementwise arithmetic.
To compute them again costs two passes over memory each, and no convolution. ("In-Place Activated BatchNorm", Rota Bulò,
Porzi, Kontschieder, 2018, https://arxiv.org/abs/1712.02616, also keeps one of the three, and inverts the activation.)

Autograd can save something else in place of a tensor (`saved_tensors_hooks`). Here it saves the way to compute it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Outputs"]

ACTIVATIONS = (nn.SiLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU)
"""Activations whose backward pass needs their input. Other activations, such as ReLU, keep one tensor less anyway."""


class _Output:
    """A tensor that can be computed again."""

    def __init__(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        self._again = again
        self._size, self._stride = tensor.size(), tensor.stride()
        self._kept: Tensor | None = None
        self._last: weakref.ref[Tensor] | None = None

    def get(self, hold: bool = False) -> Tensor:
        """Return the tensor; compute it if it no longer exists. With `hold`, it is kept for the next call."""
        value, self._kept = self._kept, None
        if value is None and self._last is not None:
            value = self._last()
        if value is None:
            with torch.no_grad():
                value = self._again()
                if value.stride() != self._stride:  # views of it rely on its strides
                    value = value.new_empty_strided(self._size, self._stride).copy_(value)
            self._last = weakref.ref(value)
        if hold:
            self._kept = value
        return value


class _View:
    """An output or a view of it, with the size, strides and offset that autograd saw."""

    def __init__(self, output: _Output, tensor: Tensor) -> None:
        self.output = output
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def get(self, hold: bool = False) -> Tensor:
        """Return the view; compute its tensor if that no longer exists. For `hold` see `_Output.get`."""
        whole = self.output.get(hold)
        return whole if self.place == (whole.size(), whole.stride(), 0) else whole.as_strided(*self.place)


class Outputs:
    """Outputs of one forward pass that can be computed again, found by their storage.

    An output is not found after it has been written to, or once its memory has been reused.
    """

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[weakref.ref[Tensor], int, _Output]] = {}

    def add(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        """Record an output and how to compute it again. The output must fill its storage from the start."""
        key = tensor.untyped_storage()._cdata
        self._by_storage[key] = weakref.ref(tensor), tensor._version, _Output(tensor, again)

    def forget(self) -> None:
        """Forget all outputs. Packed tensors keep what they need until their own backward pass is done."""
        self._by_storage.clear()

    def find(self, tensor: Tensor) -> _Output | None:
        """Return the output that a tensor is, or is a view of; None if there is none."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        if found is None or found[0]() is None or found[1] != tensor._version:
            return None
        return found[2]

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Return a function that gives the value of a tensor later and keeps little memory until then."""
        packed = self.pack(tensor)
        return packed.get if isinstance(packed, _View) else lambda: packed

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """Replace a tensor that autograd saves; for `saved_tensors_hooks`."""
        output = self.find(tensor)
        # Detached, because a node that saves its own output would keep itself alive.
        return tensor.detach() if output is None else _View(output, tensor)

    def unpack(self, packed: Tensor | _View) -> Tensor:
        """Return the tensor that `pack` replaced; for `saved_tensors_hooks`."""
        return packed.get() if isinstance(packed, _View) else packed

    def activate(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an activation. If its input can be computed again, so can its output."""
        source = self.pack(x)
        out = function(x)
        if isinstance(source, _View) and out.untyped_storage()._cdata != x.untyped_storage()._cdata:
            # The backward pass of the activation needs its input right after this.
            self.add(out, lambda: function(source.get(hold=True)))
        return out

    def normalize(self, layer: nn.Module, out: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        """Record the output of a BatchNorm, with or without its activation applied."""
        source: Any = self.keep(x)
        self.add(out, lambda: again(source()))
