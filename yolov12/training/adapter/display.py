"""Memory of a training as users see it: a column of the progress bar and columns of results.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolov12.mas import Result

__all__ = ["Display"]

_WIDTH = 22  # characters of the progress bar's column
_PEAK, _BUDGET, _MICRO_BATCH = "memory/peak_MiB", "memory/budget_MiB", "memory/micro_batch"


class Display:
    """Memory values of a training for the progress bar, results.csv and loggers.

    Args:
        csv: The run's results.csv. If its header has no memory columns, as the run began without the engine, none are
            added.
    """

    def __init__(self, csv: Path) -> None:
        self.of_epoch: dict[str, float] = {}
        """Column → value of the current epoch. A saved run keeps them."""
        self._csv = csv
        self._latest: Result | None = None

    def add(self, result: Result) -> None:
        """Update the values with a batch that was run."""
        self._latest, values = result, self.of_epoch
        values[_PEAK] = max(values.get(_PEAK, 0.0), round(result.peak_bytes / 2**20, 1))
        values[_BUDGET] = round(result.budget_bytes / 2**20, 1)
        values[_MICRO_BATCH] = max(values.get(_MICRO_BATCH, 0), *result.micro_batches)

    def metrics(self) -> dict[str, float]:
        """Return the values of this epoch, column → MiB or images, for results.csv and every logger."""
        shown = not self._csv.exists() or _PEAK in self._csv.read_text().partition("\n")[0]
        return dict(self.of_epoch) if shown else {}

    def in_order(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return metrics in the order of the columns of results.csv, where Ultralytics' own come first.

        Args:
            metrics: Column → value, without epoch and time. A file of a run that is resumed keeps its order.
        """
        header = self._csv.read_text().partition("\n")[0].split(",") if self._csv.exists() else []
        columns = header or [name for name in metrics if name not in self.of_epoch]
        place = {name: index for index, name in enumerate(columns)}
        return {name: metrics[name] for name in sorted(metrics, key=lambda name: place.get(name, len(place)))}

    def column(self) -> float:
        """Return a number for the progress bar that is formatted as micro-batch × count and peak/budget in GiB."""
        return _Column(self._latest)

    @staticmethod
    def header(stock: str) -> str:
        """Return the progress bar's header, widened for the column.

        Args:
            stock: Ultralytics' own header.
        """
        return stock.replace(f"{'GPU_mem':>11}", f"{'GPU_mem':>{_WIDTH}}", 1)


class _Column(float):
    """Number formatted as micro-batch × count and peak/budget in GiB; the progress bar appends a `G`."""

    _result: Result | None

    def __new__(cls, result: Result | None) -> _Column:
        column = super().__new__(cls, result.peak_bytes / 2**30 if result else 0.0)
        column._result = result
        return column

    def __format__(self, spec: Any) -> str:
        if self._result is None:
            return super().__format__(spec)
        sizes, budget = self._result.micro_batches, self._result.budget_bytes / 2**30
        return f"{max(sizes)}x{len(sizes)}  {float(self):.3g}/{budget:.3g}".rjust(_WIDTH - 1)
