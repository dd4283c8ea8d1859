"""Allocations that fail where a benchmark wants it: those of all operations of PyTorch in a block of code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FailingAllocations", "limit_allocator"]

_MORE_THAN_ANY_DEVICE_HAS = 2**50
_MOST_OF_A_GPU = 0.95


def limit_allocator(device: str) -> None:
    """Let PyTorch's allocator refuse an impossible request on a GPU at once.

    Without a limit, it maps all free memory before it fails if its segments are expandable.

    Args:
        device: `cpu` or `cuda`.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.set_per_process_memory_fraction(_MOST_OF_A_GPU)


class FailingAllocations(TorchDispatchMode):
    """Lets chosen allocations fail while the mode is active: an operation that makes a tensor raises, before it runs.

    The error is a real one by default: PyTorch's allocator is asked for more than any device has. Memory that an
    operation allocates only for itself, such as a workspace, is not counted.

    The backward pass counts, too, see `yolov12.mas.profiling.trace.ByteTrace`.

    Args:
        device: Device whose allocations count; those on other devices are left alone.
        like_cuda: True for an error as on a GPU, also on the CPU.
    """

    def __init__(self, device: str, *, like_cuda: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._like_cuda = torch.device(device).type, like_cuda
        self._fail_at: Collection[int] = ()
        self.count = 0
        """Number of allocations so far, with those that failed."""
        self.injected: list[str] = []
        """Operation of each allocation that failed."""

    def reset(self, fail_at: Collection[int] = ()) -> None:
        """Count from zero again.

        Args:
            fail_at: Indices of the allocations that will fail, from 0.
        """
        self._fail_at, self.count, self.injected = frozenset(fail_at), 0, []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _allocates(func) and self._device_of(args, kwargs) == self._device:
            self.count += 1
            if self.count - 1 in self._fail_at:
                self.injected.append(str(func))
                if self._like_cuda:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
                torch.empty(_MORE_THAN_ANY_DEVICE_HAS, dtype=torch.uint8, device=self._device)
        return func(*args, **kwargs)

    @staticmethod
    def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return the kind of device that the result of an operation will be on."""
        if (device := kwargs.get("device")) is not None:
            return torch.device(device).type
        first = args[0] if args else None
        while isinstance(first, (list, tuple)) and first:
            first = first[0]
        return first.device.type if isinstance(first, torch.Tensor) else "cpu"


@functools.cache
def _allocates(func: Callable[..., Any]) -> bool:
    """Return whether an operation returns a tensor that is neither one of its arguments nor a view of one."""
    returns = func._schema.returns  # type: ignore[attr-defined]
    return any(each.alias_info is None and "Tensor" in str(each.type) for each in returns)
