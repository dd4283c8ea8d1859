"""Clock of the process that loads batches: how long it reads and decodes images, and how long everything else takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from yolov12.training.adapter.users_code import module_of

__all__ = ["LoadClock"]


class LoadClock:
    """Times of the batch that this process loads. Every worker has a copy of its own."""

    def __init__(self) -> None:
        self._stock_load: Any = None  # methods of the data set
        self._stock_load_image: Any = None
        self._began_s: float | None = None
        self._decode_s = 0.0

    def watch(self, dataset: Any) -> None:
        """Measure the methods of a data set that load a batch and an image, if they are not the user's own.

        Args:
            dataset: Data set of a training loader.
        """
        methods = [getattr(dataset, name, None) for name in ("__getitems__", "load_image")]
        loads = hasattr(type(dataset), "load_image")  # a wrapper may pass on the method of another data set
        if loads and all(module_of(method).startswith(("ultralytics.", "yolov12.")) for method in methods):
            self._stock_load, self._stock_load_image = methods
            dataset.__getitems__, dataset.load_image = self._load, self._load_image

    def times_ms(self) -> tuple[float | None, float | None]:
        """Return the milliseconds of decoding and of everything else since a batch was begun; None if unknown."""
        if self._began_s is None:
            return None, None
        whole_s, self._began_s = time.perf_counter() - self._began_s, None
        return 1000 * self._decode_s, 1000 * (whole_s - self._decode_s)

    def _load(self, indices: Sequence[int]) -> Any:
        self._began_s, self._decode_s = time.perf_counter(), 0.0
        return self._stock_load(indices)

    def _load_image(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._stock_load_image(*args, **kwargs)
        finally:
            self._decode_s += time.perf_counter() - begin
