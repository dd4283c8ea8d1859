"""What a training shows of memory: the progress bar's column, the columns of results.csv, and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yolov12.mas import Result

__all__ = ["Display"]

_WIDTH = 22  # of the progress bar's column
_PEAK, _BUDGET, _MICRO_BATCH = "memory/peak_MiB", "memory/budget_MiB", "memory/micro_batch"


class Display:
    """Memory of a training for those who watch it.

    Args:
        csv: The run's results.csv. A run that began without the engine keeps the columns it has.
    """

    def __init__(self, csv: Path) -> None:
        self.of_epoch: dict[str, float] = {}
        """Values of the epoch at hand, by column; kept when a run is interrupted."""
        self._csv = csv
        self._latest: Result | None = None

    def add(self, result: Result) -> None:
        """Take in a batch that was run."""
        self._latest, values = result, self.of_epoch
        values[_PEAK] = max(values.get(_PEAK, 0.0), round(result.peak_bytes / 2**20, 1))
        values[_BUDGET] = round(result.budget_bytes / 2**20, 1)
        values[_MICRO_BATCH] = max(values.get(_MICRO_BATCH, 0), *result.micro_batches)

    def metrics(self) -> dict[str, float]:
        """Return the values of this epoch for results.csv and every logger."""
        shown = not self._csv.exists() or _PEAK in self._csv.read_text().partition("\n")[0]
        return dict(self.of_epoch) if shown else {}

    def column(self) -> float:
        """Return the number for the progress bar: peak/budget in GiB and micro-batch × count when it is formatted."""
        return _Column(self._latest)

    @staticmethod
    def header(stock: str) -> str:
        """Widen the progress bar's header for the column."""
        return stock.replace(f"{'GPU_mem':>11}", f"{'GPU_mem':>{_WIDTH}}", 1)


class _Column(float):
    """Number that formats as peak/budget in GiB and micro-batch × count, for a progress bar that puts a `G` behind."""

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
