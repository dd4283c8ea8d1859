"""Tensor whose shape, dtype and device are known, and whose values are made when somebody uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.modules import each_tensor

__all__ = ["DeferredTensor", "TensorFacts", "made"]


@dataclass(frozen=True)
class TensorFacts:
    """Shape, dtype and device of a tensor that can still be made."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class DeferredTensor(Tensor):
    """Tensor that is made when its values are used.

    Args:
        facts: Shape, dtype and device, which are known before.
        make: Returns the tensor itself; called once at most.
        pick: Returns the tensor's entries for an index of its first dimension, without making the others; None if it
            can only be made as a whole.
    """

    _make: Callable[[], Tensor]
    _pick: Callable[[int | slice], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls, facts: TensorFacts, make: Callable[[], Tensor], pick: Callable[[int | slice], Tensor] | None = None
    ) -> DeferredTensor:
        """Make a tensor without memory."""
        tensor: DeferredTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,unused-ignore]
            cls, facts.shape, dtype=facts.dtype, device=facts.device
        )
        tensor._make, tensor._pick, tensor._value = make, pick, None
        return tensor

    def __init__(
        self, facts: TensorFacts, make: Callable[[], Tensor], pick: Callable[[int | slice], Tensor] | None = None
    ) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Answer from the facts if they suffice; otherwise run the function on the tensor itself."""
        if func in _FROM_FACTS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call,unused-ignore]
        if func is Tensor.__getitem__ and isinstance(args[0], cls) and isinstance(args[1], (int, slice)):
            tensor, index = args
            if tensor._pick is not None and tensor._value is None:
                return tensor._pick(index)
        args, kwargs = each_tensor((args, dict(kwargs or {})), made)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override,unused-ignore]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation that was not called through Python, as in scripts and custom functions, on the tensor."""
        args, kwargs = each_tensor((args, dict(kwargs or {})), made)
        return func(*args, **kwargs)


_FROM_FACTS = frozenset({
    Tensor.shape.__get__,  # type: ignore[attr-defined,unused-ignore]
    Tensor.size,
    Tensor.__len__,
    Tensor.dim,
    Tensor.ndim.__get__,  # type: ignore[attr-defined,unused-ignore]
    Tensor.numel,
    Tensor.dtype.__get__,  # type: ignore[attr-defined,unused-ignore]
    Tensor.device.__get__,  # type: ignore[attr-defined,unused-ignore]
})  # fmt: skip


def made(value: Any) -> Any:
    """Return what a deferred tensor stands for; return anything else unchanged."""
    if not isinstance(value, DeferredTensor):
        return value
    if value._value is None:
        value._value = value._make()
    return value._value
