"""How long layers take on a card that is not there: the longer of computing and of moving bytes, for every operation.

The roofline model: Williams, Waterman, Patterson, 2009, https://doi.org/10.1145/1498765.1498785. Good enough to compare
recomputing one layer with recomputing another, which is what it is used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yolov12.mas.profile import Time

__all__ = ["Roofline"]

_HOST_MS = 0.05
"""Of an operation, in Python, autograd and the launch: YOLO12-S takes 70 ms for its 1100, however small the batch."""

_REACHED = 0.45  # of what makers say: then YOLO12-S takes the 1.05 ms an image that it takes on an H100
_aten = torch.ops.aten


class Roofline(TorchDispatchMode):
    """A clock that operations move, on fake tensors or real ones.

    Args:
        teraflops: Multiplications and additions in half precision that the card makes in a second, in 1e12.
        gigabytes_per_s: That its memory moves.
    """

    def __init__(self, teraflops: float, gigabytes_per_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops_per_ms, self._bytes_per_ms = _REACHED * teraflops * 1e9, _REACHED * gigabytes_per_s * 1e6
        self.host_ms = self.device_ms = 0.0
        """Since it was made."""

    @contextmanager
    def timing(self, layers: Mapping[str, nn.Module], into: dict[str, Time]) -> Iterator[None]:
        """Add up the time of each layer's forward passes."""
        began: dict[str, tuple[float, float]] = {}

        def before(name: str) -> None:
            began[name] = self.host_ms, self.device_ms

        def after(name: str) -> None:
            host_ms, device_ms = began[name]
            so_far = into.get(name, Time(0.0, 0.0))
            into[name] = Time(so_far.host_ms + self.host_ms - host_ms, so_far.device_ms + self.device_ms - device_ms)

        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(_removing(layer.register_forward_pre_hook(lambda *_, name=name: before(name))))
                hooks.enter_context(_removing(layer.register_forward_hook(lambda *_, name=name: after(name))))
            yield

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if given and made and not func.is_view and func._overloadpacket is not _aten.empty_like:
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
            self.device_ms += max(moved / self._bytes_per_ms, _flops(func, args, made) / self._flops_per_ms)
            self.host_ms += _HOST_MS
        return result


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _flops(func: Any, args: tuple[Any, ...], made: list[Tensor]) -> float:
    """Of the forward pass' convolutions and matrix products; what else there is moves bytes."""
    kind = func._overloadpacket
    if kind is _aten.convolution:
        return 2.0 * float(made[0].numel() * args[1].numel() / args[1].shape[0])
    if kind in (_aten.mm, _aten.bmm):
        return 2.0 * float(args[0].numel() * args[1].shape[-1])
    return 0.0
