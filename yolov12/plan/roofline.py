"""How long layers take on a card that is not there: the longer of computing and of moving bytes, for every operation.

The roofline model: Williams, Waterman, Patterson, 2009, https://doi.org/10.1145/1498765.1498785. Good enough to compare
recomputing one layer with recomputing another, which is what it is used for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yolov12.mas.profiling.profile import Time

__all__ = ["Roofline", "Times"]

_HOST_MS = 0.05
"""Of an operation, in Python, autograd and the launch: YOLO12-S takes 70 ms for its 1100, however small the batch."""

_REACHED = 0.45  # of what makers say: then YOLO12-S takes the 1.05 ms an image that it takes on an H100
_aten = torch.ops.aten


@dataclass(frozen=True)
class Times:
    """Of layers' forward passes, by name."""

    whole: dict[str, Time] = field(default_factory=dict)
    cheap: dict[str, Time] = field(default_factory=dict)
    """Of what is in them and could be made again by itself."""


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
    def timing(self, layers: Mapping[str, nn.Module], cheap: Iterable[nn.Module], into: Times) -> Iterator[None]:
        """Add up the time of each layer's forward passes, and of the modules in `cheap` that run within."""
        running: list[str] = []
        began: list[Time] = []

        def begin(name: str | None) -> None:
            began.append(Time(self.host_ms, self.device_ms))
            if name is not None:
                running.append(name)

        def end(name: str | None) -> None:
            start = began.pop()
            time = Time(self.host_ms - start.host_ms, self.device_ms - start.device_ms)
            if name is None:
                for outer in running:
                    into.cheap[outer] = _sum(into.cheap.get(outer), time)
            else:
                running.remove(name)
                into.whole[name] = _sum(into.whole.get(name), time)

        watched = [*layers.items(), *((None, module) for module in cheap)]
        with ExitStack() as hooks:
            for name, module in watched:
                before = module.register_forward_pre_hook(lambda *_, name=name: begin(name))
                after = module.register_forward_hook(lambda *_, name=name: end(name))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
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


def _sum(so_far: Time | None, time: Time) -> Time:
    return time if so_far is None else Time(so_far.host_ms + time.host_ms, so_far.device_ms + time.device_ms)


def _flops(func: Any, args: tuple[Any, ...], made: list[Tensor]) -> float:
    """Of the forward pass' convolutions and matrix products; what else there is moves bytes."""
    kind = func._overloadpacket
    if kind is _aten.convolution:
        return 2.0 * float(made[0].numel() * args[1].numel() / args[1].shape[0])
    if kind in (_aten.mm, _aten.bmm):
        return 2.0 * float(args[0].numel() * args[1].shape[-1])
    return 0.0
