"""Launch grid of kernels that work on groups of images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.triton_launch import launch, stream, unit_of

__all__ = ["LaunchGrid", "Tuning"]

_MOST_PROGRAMS = 65535
"""Most programs along an axis of the grid other than the first."""


@dataclass(frozen=True)
class Tuning:
    """Size of the programs of a kernel, as measured on a GPU."""

    values: int
    """Number of values that a program processes at a time."""
    channels: int
    """Most channels of a program."""
    warps: int
    """Number of warps of a program."""
    unroll: int | None = None
    """For kernels that compute sums: number of blocks of `values` that are loaded before the first is used."""
    programs: int | None = None
    """For kernels that compute sums: number of programs per multiprocessor. Other kernels have a program per block."""


class LaunchGrid:
    """Launch grid for one shape: blocks of channels × programs that share a group × groups.

    Args:
        channels: Number of channels.
        pixels: Number of pixels of an image.
        sizes: Number of images in each group.
        device: CUDA device; or the meta device, see `triton_launch.launch`.
        tuning: Size of the programs.
    """

    def __init__(
        self, channels: int, pixels: int, sizes: tuple[int, ...], device: torch.device, tuning: Tuning
    ) -> None:
        self._device, self._channels, self._pixels, self._warps = device, channels, pixels, tuning.warps
        channel_block = min(1 << (channels - 1).bit_length(), tuning.channels)
        row_block = tuning.values // channel_block
        channel_blocks = -(-channels // channel_block)
        splits = min(-(-max(sizes) * pixels // (row_block * (tuning.unroll or 1))), _MOST_PROGRAMS)
        if tuning.programs is not None and device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            # Rounded down, as programs beyond those that run at once would double the time.
            splits = max(1, min(splits, tuning.programs * processors // (channel_blocks * len(sizes))))
        self._grid = (channel_blocks, splits, len(sizes))
        self._constants = (row_block, channel_block, *([] if tuning.unroll is None else [tuning.unroll]))
        self._has_sums = tuning.programs is not None
        self._ends = _ends(sizes, device)
        self._scratch: dict[int, tuple[Tensor, ...]] = {}
        self._arguments: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def launch(
        self,
        kernel: Any,
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...] = (),
        strides: tuple[int, ...] = (),
        switches: tuple[bool, ...] = (),
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: One of `kernels`.
            tensors: Its first arguments.
            numbers: Numbers that follow the scratch memory.
            strides: Distances of rows, in values. The kernel gets them in units, like the channels.
            switches: Constants.
        """
        current = stream(self._device)
        scratch = self._scratch.get(current) or self._take_scratch(current)
        sizes, constants = self._arguments.get(strides) or self._make_arguments(strides)
        launch(kernel, self._grid, (*tensors, *scratch), (*numbers, *sizes), (*switches, *constants), self._warps)

    def _make_arguments(self, strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return numbers and constants that every launch with these strides has."""
        unit = unit_of(self._channels, *strides)
        _, splits, groups = self._grid
        sizes = (*[each // unit for each in strides], self._pixels, self._channels // unit, groups, splits)
        self._arguments[strides] = sizes, (unit, *self._constants)
        return self._arguments[strides]

    def _take_scratch(self, current: int) -> tuple[Tensor, ...]:
        """Return the ends of groups and, for sums, memory for those of programs and for counters of finished programs.

        The counters are zero between launches.
        """
        scratch: tuple[Tensor, ...] = (self._ends,)
        if self._has_sums:
            channel_blocks, splits, groups = self._grid
            sums, counters = 2 * groups * splits * self._channels, groups * channel_blocks
            scratch += _shared_scratch(self._device, current, sums, counters)
        self._scratch[current] = scratch
        return scratch


@functools.cache  # a captured CUDA graph reads the tensor
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the end of each group in images, after a leading zero. Cached, as the copy waits for the device."""
    return torch.tensor((0, *sizes)).cumsum(0).to(device, torch.int32)


_scratches: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _shared_scratch(device: torch.device, current: int, sums: int, counters: int) -> tuple[Tensor, Tensor]:
    """Return scratch memory that all launches on one stream share. They run one after the other."""
    known = _scratches.get((device, current))
    if known is None or known[0].numel() < sums or known[1].numel() < counters:
        known = torch.empty(sums, device=device), torch.zeros(counters, dtype=torch.int32, device=device)
        _scratches[device, current] = known
    return known
