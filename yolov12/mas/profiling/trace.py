"""Counts bytes of tensors during a forward and backward pass, on any device or with fake tensors.

    with FakeTensorMode() as fake, ByteTrace() as trace:  # in this order; it also works without fake tensors
        loss(model(images)).backward()
    trace.peak_bytes()

The count is what PyTorch's CUDA allocator would count. Each storage counts once, however many views share it, from the
operation that makes it until nothing refers to it, in blocks of 512 bytes. Memory that a kernel allocates and frees by
itself, such as cuDNN's workspace, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["BLOCK_BYTES", "ByteTrace", "rounded"]

BLOCK_BYTES = 512
"""CUDA's caching allocator rounds requests up to a multiple of this."""


def rounded(size_bytes: int) -> int:
    """Return the bytes that the allocator uses for a request."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


class ByteTrace(TorchDispatchMode):
    """Counts the bytes of all storages that are made while the mode is active, until they are freed.

    Storages that were made before do not count, also not when they are freed. A storage that is freed after the mode
    has ended is still subtracted. Autograd runs the backward pass of CUDA tensors in its own threads. PyTorch passes on
    to them the modes of the thread that called `backward`, so these operations count, too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._followed: dict[int, tuple[weakref.ref[Any], int]] = {}  # by the address of the C++ storage
        self._allocated_bytes = self._peak_bytes = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storages that were made during the trace and still exist."""
        return self._allocated_bytes

    def mark(self) -> int:
        """Reset the peak; return the bytes allocated now."""
        self._peak_bytes = self._allocated_bytes
        return self._allocated_bytes

    def peak_bytes(self) -> int:
        """Return the highest allocated bytes since the last mark, or since the beginning."""
        return self._peak_bytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # `torch.tensor` makes its tensor without a visible operation, then calls `lift_fresh` on it.
        made_before = func is not torch.ops.aten.lift_fresh.default
        given = {_key(tensor) for tensor in _tensors((args, kwargs)) if made_before}
        for tensor in _tensors(result):
            key, size = _key(tensor), rounded(tensor.untyped_storage().nbytes())
            _, known = self._followed.get(key, (None, 0))
            if key in self._followed:
                self._add(size - known)  # `resize_` of a known storage
                self._followed[key] = self._followed[key][0], size
            elif key not in given:
                # The Python object of a storage lives as long as the storage, whatever refers to it.
                ended = weakref.ref(tensor.untyped_storage(), self._end_of(key))
                self._followed[key] = ended, size
                self._add(size)
        return result

    def _add(self, size_bytes: int) -> None:
        self._allocated_bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, self._allocated_bytes)

    def _end_of(self, key: int) -> Callable[[Any], None]:
        def ended(_: Any) -> None:
            self._allocated_bytes -= self._followed.pop(key)[1]

        return ended


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
