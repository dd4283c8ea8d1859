"""A whole run in a few numbers and lines, from the rows of its journal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_low

__all__ = ["RESUMED", "Summary", "summarise"]

RESUMED = "resumed"
"""Event that the journal adds to the first row after a resume."""


@dataclass(frozen=True)
class Summary:
    """A whole run, with the parts before a resume. None where there is nothing to tell it from."""

    updates: int
    """That the weights have gone through."""
    updates_expected: int | None
    updates_repeated: int
    """Not among `updates`: made after the last checkpoint before an interruption, and made again after the resume."""
    images: int
    """In `updates`."""
    images_lost: int
    """That entered a step and did not reach an update."""
    out_of_memories: int
    """Survived ones."""
    retries: int
    shrinks: int
    grows: int
    peak_mean_mib: float | None
    peak_sd_mib: float | None
    peak_max_mib: float | None
    budget_min_mib: float | None
    budget_max_mib: float | None
    prediction_error_percent: float | None
    """Median of |predicted - measured| / measured peak."""
    micro_batch_min: int | None
    """Images in the largest micro-batch of a step; so are the two below."""
    micro_batch_median: int | None
    micro_batch_max: int | None
    images_per_s: float | None
    """Median of the steps."""
    gpu_utilisation_percent: float | None
    """Mean of the samples."""

    def as_text(self) -> str:
        """Return the lines to log at the end of a run."""
        lost = _counted(self.images_lost, "image", "images")
        if self.peak_mean_mib is None:
            return f"memory: no steps were run, {lost} lost"
        updates = _counted(self.updates, "update", "updates")
        if self.updates_expected is not None:
            updates = f"{self.updates:,} of {_counted(self.updates_expected, 'update', 'updates')}"
        repeated = f" ({self.updates_repeated:,} more were repeated after a resume)" if self.updates_repeated else ""
        budget = _span(self.budget_min_mib, self.budget_max_mib)
        error = self.prediction_error_percent
        sizes = _span(self.micro_batch_min, self.micro_batch_max)
        middle = f", median {self.micro_batch_median:,}" if self.micro_batch_min != self.micro_batch_max else ""
        changes = f"shrunk {_counted(self.shrinks, 'time', 'times')}, grown {_counted(self.grows, 'time', 'times')}"
        busy = self.gpu_utilisation_percent
        return (
            f"memory: {_counted(self.out_of_memories, 'out-of-memory', 'out-of-memories')} survived, {lost} lost, "
            f"{updates}{repeated}\n"
            f"  peak {self.peak_mean_mib:,.0f} ± {self.peak_sd_mib:,.0f} MiB, at most {self.peak_max_mib:,.0f}, "
            f"of a budget of {budget} MiB" + (f"; predicted to {error:.1f} %" if error is not None else "") + "\n"
            f"  micro-batches of {sizes} images{middle}, {changes}"
            + (f"; {self.images_per_s:,.1f} images/s" if self.images_per_s is not None else "")
            + (f"; GPU busy {busy:.0f} % of the time" if busy is not None else "")
        )


def summarise(
    rows: Sequence[Mapping[str, str]],
    updates_expected: int | None,
    first_step: int,
    images_lost: int,
    busy_percent: float | None,
) -> Summary:
    """Sum up the rows of memory.csv.

    Args:
        rows: By column name.
        updates_expected: From `first_step` on; None where not known.
        first_step: Where the part of the run begins that is not from before a resume.
        images_lost: See `Summary`, as the next.
        busy_percent: GPU utilisation.
    """
    kept = _kept(rows)
    if updates_expected is not None:
        updates_expected += sum(int(row["step"]) < first_step for row in kept)
    events = [event for row in rows for event in row["events"].split("; ")]
    peaks, predictions, budgets = (
        [float(row[name]) for row in rows] for name in ("peak_mib", "predicted_mib", "budget_mib")
    )
    errors = [abs(predicted - peak) / peak * 100 for predicted, peak in zip(predictions, peaks, strict=True) if peak]
    largest = [max(map(int, row["micro_batches"].split())) for row in rows if int(row["images"])]
    speeds = [float(row["images_per_s"]) for row in rows if row["images_per_s"]]
    mean = fmean(peaks) if peaks else None
    return Summary(
        updates=len(kept),
        updates_expected=updates_expected,
        updates_repeated=len(rows) - len(kept),
        images=sum(int(row["images"]) for row in kept),
        images_lost=images_lost,
        out_of_memories=sum(event.startswith("out-of-memory") for event in events),
        retries=sum(event.startswith("retried") for event in events),
        shrinks=sum(event.startswith("shrunk") for event in events),
        grows=sum(event.startswith("grew") for event in events),
        peak_mean_mib=mean,
        peak_sd_mib=math.sqrt(fmean((peak - mean) ** 2 for peak in peaks)) if mean is not None else None,
        peak_max_mib=max(peaks, default=None),
        budget_min_mib=min(budgets, default=None),
        budget_max_mib=max(budgets, default=None),
        prediction_error_percent=median(errors) if errors else None,
        micro_batch_min=min(largest, default=None),
        micro_batch_median=median_low(largest) if largest else None,
        micro_batch_max=max(largest, default=None),
        images_per_s=median(speeds) if speeds else None,
        gpu_utilisation_percent=busy_percent,
    )


def _kept(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Rows whose update is in the weights: a resume may start an epoch anew, from the checkpoint before it."""
    kept: list[Mapping[str, str]] = []
    for row in rows:
        if RESUMED in row["events"].split("; "):
            while kept and int(kept[-1]["epoch"]) >= int(row["epoch"]):
                kept.pop()
        kept.append(row)
    return kept


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _span(low: float | None, high: float | None) -> str:
    first, last = f"{low:,.0f}", f"{high:,.0f}"
    return first if first == last else f"{first} to {last}"
