"""Concatenation of channels whose parts are written where they belong, so that nothing is left to copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.batchnorm.fused import row_stride
from yolov12.mas.triton_launch import unfilled

__all__ = ["Join", "Slot", "adds_up"]


class Join:
    """Concatenation along the channels. Its parts come in order, or into slots.

    Args:
        channels: Number of channels of the result.
    """

    def __init__(self, channels: int) -> None:
        self._channels, self._end = channels, 0
        self._buffer: Tensor | None = None
        self._parts: dict[int, Tensor] = {}  # by first channel
        self._copies: dict[int, tuple[Tensor, int]] = {}  # what other layers read of a part, and its version then
        self._in_place = True

    def slot(self, start: int) -> Slot:
        """Return the place of the part that begins at a channel, whenever that part comes."""
        return Slot(self, start)

    @unfilled
    def place(self, shape: Sequence[int], like: Tensor, start: int | None = None) -> Tensor | None:
        """Return the slice that receives a part; None if there is no place for it.

        Args:
            shape: Shape of the part: (images, channels, height, width).
            like: Tensor with the type of the part.
            start: First channel of the part; None for the next part.
        """
        if not self._in_place:
            return None
        images, channels, height, width = shape
        whole = images, self._channels, height, width
        if self._buffer is None:
            self._buffer = torch.empty(whole, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        there, start = self._buffer, self._end if start is None else start
        fits = there.shape == whole and there.dtype == like.dtype
        fits = fits and not any(at < start + channels and start < at + n.shape[1] for at, n in self._parts.items())
        # `data` has a version counter of its own: writing to one part does not make autograd reject another.
        return there.data[:, start : start + channels] if fits and start + channels <= self._channels else None

    def add(
        self, part: Tensor, start: int | None = None, *, in_place: bool = False, copy: Tensor | None = None
    ) -> None:
        """Add a part.

        Args:
            part: The part.
            start: Its first channel; None for the next part.
            in_place: True if it was written to the slice from `place`.
            copy: Copy of its last channels that other layers read; None for no copy.
        """
        start = self._end if start is None else start
        self._parts[start] = part
        if copy is not None:
            self._copies[start] = copy, copy._version
        self._end = start + part.shape[1]
        self._in_place = self._in_place and in_place

    def is_complete(self) -> bool:
        """Return whether all parts are there, and were written where they belong."""
        ends = [start + part.shape[1] for start, part in sorted(self._parts.items())]
        covers = sorted(self._parts) == [0, *ends[:-1]] and ends[-1:] == [self._channels]
        return self._in_place and covers and not any(map(self._is_outdated, self._parts))

    def result(self) -> Tensor:
        """Return the concatenation of all parts."""
        if not self.is_complete():
            return torch.cat([self._latest(start) for start in sorted(self._parts)], 1)
        parts = [part for _, part in sorted(self._parts.items())]
        out: Tensor = _Joined.apply((self._buffer,), *parts)  # type: ignore[no-untyped-call]
        return out

    def _is_outdated(self, start: int) -> bool:
        """Return whether a layer has written to the copy of a part, as an in-place activation does."""
        copy, version = self._copies.get(start, (None, 0))
        return copy is not None and copy._version != version

    def _latest(self, start: int) -> Tensor:
        part = self._parts[start]
        if not self._is_outdated(start):
            return part
        copy, _ = self._copies[start]
        return torch.cat((part[:, : part.shape[1] - copy.shape[1]], copy), 1)


class Slot:
    """Place of one part of a concatenation.

    Args:
        join: The concatenation.
        start: First channel of the part.
    """

    def __init__(self, join: Join, start: int) -> None:
        self._join, self._start = join, start

    def place(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """Return the slice that receives the part, see `Join.place`."""
        return self._join.place(shape, like, self._start)

    def add(self, part: Tensor, *, in_place: bool = False, copy: Tensor | None = None) -> None:
        """Add the part, see `Join.add`."""
        self._join.add(part, self._start, in_place=in_place, copy=copy)


def adds_up(x: Tensor, residual: Tensor) -> bool:
    """Return whether the kernels can add a residual to an output with the shape and type of `x`."""
    return residual.dtype == x.dtype and residual.shape == x.shape and row_stride(residual) is not None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: tuple[Tensor], *parts: Tensor) -> Tensor:
        ctx.channels = [part.shape[1] for part in parts]
        return buffer[0]  # hidden in a tuple, as it is no argument for autograd

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(ctx.channels, 1)
