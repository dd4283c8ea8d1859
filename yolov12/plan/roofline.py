"""Estimates how long layers take on a GPU that this machine does not have.

The estimate is a roofline model (Williams, Waterman, Patterson, 2009, https://doi.org/10.1145/1498765.1498785). An
operation takes the time of its arithmetic or of its memory traffic, whichever is longer. This is accurate enough to
compare the cost of recomputing different layers.
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

__all__ = ["LayerTimes", "Roofline"]

_HOST_MS = 0.05
"""Host time per operation: Python, autograd and launch. YOLO12-S needs 70 ms for 1100 operations."""

_REACHED = 0.45  # fraction of nominal speed: gives the 1.05 ms per image measured for YOLO12-S on an H100
_aten = torch.ops.aten


@dataclass(frozen=True)
class LayerTimes:
    """Times of forward passes, by layer name."""

    whole: dict[str, Time] = field(default_factory=dict)
    """Time of the whole layer."""
    cheap: dict[str, Time] = field(default_factory=dict)
    """Time of the cheap modules in the layer, which can be recomputed alone."""


class Roofline(TorchDispatchMode):
    """Adds up the estimated time of all operations that run inside it, on fake or real tensors.

    Args:
        teraflops: Nominal 1e12 operations per second of the GPU in half precision. An addition and a multiplication are
            two operations.
        gigabytes_per_s: Nominal memory bandwidth of the GPU, in 1e9 bytes per second.
    """

    def __init__(self, teraflops: float, gigabytes_per_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops_per_ms, self._bytes_per_ms = _REACHED * teraflops * 1e9, _REACHED * gigabytes_per_s * 1e6
        self.host_ms = self.device_ms = 0.0
        """Milliseconds of all operations so far."""

    @contextmanager
    def timing(self, layers: Mapping[str, nn.Module], cheap: Iterable[nn.Module], into: LayerTimes) -> Iterator[None]:
        """Add up the times of forward passes inside the `with` block.

        Args:
            layers: Name → layer. Layers may be nested.
            cheap: Modules whose time is also added up for each layer that contains them.
            into: The times are added to this object.
        """
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
    """Return the operations of a convolution or matrix product. Memory traffic bounds all other operations."""
    kind = func._overloadpacket
    if kind is _aten.convolution:
        return 2.0 * float(made[0].numel() * args[1].numel() / args[1].shape[0])
    if kind in (_aten.mm, _aten.bmm):
        return 2.0 * float(args[0].numel() * args[1].shape[-1])
    return 0.0
