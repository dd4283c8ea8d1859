"""Prefetch: copies parts of a batch from the host to the device, the next part while the current one is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.modules import each_tensor
from yolov12.mas.oom import is_out_of_memory
from yolov12.mas.step.retry import IN_A_COPY, Note, no_note

__all__ = ["Prefetch"]


class Prefetch:
    """Parts of one batch on the device, prefetched on a separate CUDA stream.

    A copy overlaps with computation if the batch is in pinned memory, as from a `DataLoader` with `pin_memory`. On the
    CPU nothing is prefetched.

    Args:
        device: Destination of the copies.
        part: Called with `start` and `stop`; returns images `start` to `stop` of the batch on the host, as nested
            containers of tensors.
        note: Called with an event if the next part could not be copied ahead.
    """

    def __init__(self, device: torch.device, part: Callable[[int, int], Any], note: Note = no_note) -> None:
        self._device, self._part, self._note = device, part, note
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[tuple[int, int], Any] | None = None

    def get(self, start: int, stop: int) -> Any:
        """Return images `start` to `stop` on the device, ready for the current stream.

        Args:
            start: First image.
            stop: Image after the last.

        Raises:
            RuntimeError: The allocation failed; see `oom.is_out_of_memory` for its forms.
        """
        ahead, self._ahead = self._ahead, None
        part = ahead[1] if ahead is not None and ahead[0] == (start, stop) else self._copy(start, stop)
        self._finish_copies()
        return part

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to copy the part that is needed next. If memory is short, do nothing: `get` copies it then.

        Args:
            start: First image.
            stop: Image after the last.
        """
        if self._stream is None:
            return
        try:
            self._ahead = (start, stop), self._copy(start, stop)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._ahead = None
            self._note(IN_A_COPY)

    def drop(self) -> None:
        """Free the prefetched part."""
        self._finish_copies()
        self._ahead = None

    def _finish_copies(self) -> None:
        # The target of a copy must not be reused before the copy is complete.
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _copy(self, start: int, stop: int) -> Any:
        try:
            return each_tensor(self._part(start, stop), self._to_device)
        except BaseException:
            self._finish_copies()
            raise

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self._device, copy=True)  # a loss may change it in place, and run again
        # The target is allocated on the stream that will use it, so that it can be freed as usual. The copy must not
        # begin before that stream has finished with the previous content of this memory. That content belongs to the
        # part before, not to the part that is computed meanwhile.
        target = torch.empty_like(tensor, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        return target
