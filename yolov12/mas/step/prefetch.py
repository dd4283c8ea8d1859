"""Brings parts of a batch from the host to the device, the next one while this one computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.modules import each_tensor
from yolov12.mas.oom import is_out_of_memory

__all__ = ["Prefetch"]


class Prefetch:
    """Copies ahead on a stream of its own.

    The copy overlaps with computing where the batch lies in pinned memory, as a `DataLoader` with `pin_memory` leaves
    it.

    Args:
        device: Where to.
        cut: Gives images `start` to `stop` of the batch, on the host.
    """

    def __init__(self, device: torch.device, cut: Callable[[int, int], Any]) -> None:
        self._device, self._cut = device, cut
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[tuple[int, int], Any] | None = None

    def get(self, start: int, stop: int) -> Any:
        """Give images `start` to `stop` on the device, ready for the current stream.

        Raises:
            RuntimeError: Of whatever kind the allocation failed with.
        """
        ahead, self._ahead = self._ahead, None
        part = ahead[1] if ahead is not None and ahead[0] == (start, stop) else self._copy(start, stop)
        self._finish_copies()
        return part

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to copy the part that will be asked for next; where memory does not allow it, later will do."""
        if self._stream is None:
            return
        try:
            self._ahead = (start, stop), self._copy(start, stop)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._ahead = None

    def drop(self) -> None:
        """Forget what was copied ahead."""
        self._finish_copies()
        self._ahead = None

    def _finish_copies(self) -> None:
        # Memory that a copy is still on its way to must not be used for anything else.
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _copy(self, start: int, stop: int) -> Any:
        try:
            return each_tensor(self._cut(start, stop), self._to_device)
        except BaseException:
            self._finish_copies()
            raise

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self._device, copy=True)  # a loss may write on it, and run again
        # Allocated on the stream that will use it, so that freeing it needs no care; the copy must not begin before
        # that stream has done with whatever lay there, which is the step before, not the one that computes meanwhile.
        target = torch.empty_like(tensor, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        return target
