"""A whole run in a few numbers and lines, from the rows of its journal, or of the journals of all its ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, median_low, multimode

__all__ = ["RESUMED", "Summary", "summarise"]

RESUMED = "resumed"
"""Event that the journal adds to the first row after a resume."""

_Row = Mapping[str, str]
_LINES = 8  # of more ranks only those that stand out are told


@dataclass(frozen=True)
class Summary:
    """A whole run, with the parts before a resume. None where there is nothing to tell it from.

    Of several ranks it covers all whose journals there are, and `ranks` has each by itself. Steps in which a rank had
    no image tell nothing about its memory and its speed.
    """

    updates: int
    """That the weights have gone through."""
    updates_expected: int | None
    updates_repeated: int
    """Not among `updates`: made after the last checkpoint before an interruption, and made again after the resume."""
    images: int
    """In `updates`."""
    images_lost: int | None
    """That entered a step and did not reach an update; None in `ranks`."""
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
    """Median of the steps. Of several ranks: images of all in a step, by the longest time that one of them computed."""
    gpu_utilisation_percent: float | None
    """Mean of the samples, which are of rank 0's device; None in `ranks`."""
    rank: int | None = None
    """In `ranks`: which. None elsewhere, like the two below."""
    share_min: int | None = None
    """Images that the rank had in a step, of those that were of a whole batch."""
    share_max: int | None = None
    ranks_missing: int = 0
    """Whose journals are not in the folder of rank 0: no figure has anything of them."""
    ranks: tuple[Summary, ...] = ()
    """Each rank by itself, 0 first; empty if there is one."""

    def as_text(self) -> str:
        """Return the lines to log at the end of a run."""
        lost = _counted(self.images_lost or 0, "image", "images")
        if self.peak_mean_mib is None:
            return f"memory: no steps were run, {lost} lost"
        updates = _counted(self.updates, "update", "updates")
        if self.updates_expected is not None:
            updates = f"{self.updates:,} of {_counted(self.updates_expected, 'update', 'updates')}"
        repeated = f" ({self.updates_repeated:,} more were repeated after a resume)" if self.updates_repeated else ""
        error, busy = self.prediction_error_percent, self.gpu_utilisation_percent
        middle = f", median {self.micro_batch_median:,}" if self.micro_batch_min != self.micro_batch_max else ""
        changes = f"shrunk {_counted(self.shrinks, 'time', 'times')}, grown {_counted(self.grows, 'time', 'times')}"
        gpu = "GPU of rank 0" if self.ranks or self.ranks_missing else "GPU"
        text = (
            f"memory: {self._failures()} survived, {lost} lost, {updates}{repeated}\n"
            f"  peak {self.peak_mean_mib:,.0f} ± {self.peak_sd_mib:,.0f} MiB, at most {self.peak_max_mib:,.0f}, "
            f"of a budget of {self._budget()} MiB"
            + (f"; predicted to {error:.1f} %" if error is not None else "")
            + "\n"
            f"  micro-batches of {self._micro_batches()} images{middle}, {changes}"
            + (f"; {self.images_per_s:,.1f} images/s" if self.images_per_s is not None else "")
            + (f"; {gpu} busy {busy:.0f} % of the time" if busy is not None else "")
        )
        return "\n  ".join((text, *self._lines_of_ranks()))

    def _lines_of_ranks(self) -> list[str]:
        told = list(self.ranks)
        if len(told) > _LINES:
            slowest = min(told, key=lambda each: math.inf if each.images_per_s is None else each.images_per_s)
            told = [slowest]
            fullest = max(self.ranks, key=lambda each: each.out_of_memories)
            if fullest.out_of_memories and fullest is not slowest:
                told = sorted((slowest, fullest), key=self.ranks.index)
        lines = [each._line() for each in told]
        if more := len(self.ranks) - len(told):
            lines.append(f"{more:,} more ranks, of which none was slower or had more out-of-memories")
        if self.ranks_missing:
            journals = _counted(self.ranks_missing, "journal is", "journals are")
            lines.append(f"without what other ranks did: {journals} not in this folder")
        return lines

    def _line(self) -> str:
        if self.peak_max_mib is None:
            return f"rank {self.rank}: no images"
        share = f"{_span(self.share_min, self.share_max)} images a step in " if self.share_min is not None else ""
        speed = f", {self.images_per_s:,.1f} images/s" if self.images_per_s is not None else ""
        memory = f"peak {self.peak_max_mib:,.0f} of {self._budget()} MiB"
        return f"rank {self.rank}: {share}micro-batches of {self._micro_batches()}{speed}, {memory}, {self._failures()}"

    def _failures(self) -> str:
        return _counted(self.out_of_memories, "out-of-memory", "out-of-memories")

    def _budget(self) -> str:
        return _span(self.budget_min_mib, self.budget_max_mib)

    def _micro_batches(self) -> str:
        return _span(self.micro_batch_min, self.micro_batch_max)


def summarise(
    journals: Mapping[int, Sequence[_Row]],
    updates_expected: int | None,
    first_step: int,
    images_lost: int,
    busy_percent: float | None,
    ranks_missing: int = 0,
) -> Summary:
    """Sum up the rows of memory.csv, and of the files of other ranks.

    Args:
        journals: Rank → rows by column name. The first is that whose updates count: of one rank, or of rank 0 of all.
        updates_expected: From `first_step` on; None where not known.
        first_step: Where the part of the run begins that is not from before a resume.
        images_lost: See `Summary`, as the next two.
        busy_percent: GPU utilisation.
        ranks_missing: How many.
    """
    first = next(iter(journals.values()))
    kept = [_step(row) for row in _kept(first)]
    again = {_step(row) for row in first}.difference(kept)
    if updates_expected is not None:
        updates_expected += sum(step < first_step for step in kept)
    ranks: tuple[Summary, ...] = ()
    if len(journals) > 1:
        whole = _whole_steps(journals.values())
        ranks = tuple(_of_rank(rank, rows, again, whole) for rank, rows in journals.items())
    return replace(
        _figures(list(journals.values()), again),
        updates_expected=updates_expected,
        images_lost=images_lost,
        gpu_utilisation_percent=busy_percent,
        ranks_missing=ranks_missing,
        ranks=ranks,
    )


def _whole_steps(journals: Iterable[Sequence[_Row]]) -> set[int]:
    """Steps with as many images as most have: the last batch of an epoch may be smaller, and so are a warm-up's."""
    images: dict[int, int] = {}
    for row in (row for rows in journals for row in rows):
        images[_step(row)] = images.get(_step(row), 0) + int(row["images"])
    whole = max(multimode(images.values()), default=0)
    return {step for step, count in images.items() if count == whole}


def _of_rank(rank: int, rows: Sequence[_Row], again: Collection[int], whole: Collection[int]) -> Summary:
    shares = [int(row["images"]) for row in rows if _step(row) in whole]
    low, high = min(shares, default=None), max(shares, default=None)
    return replace(_figures([rows], again), rank=rank, share_min=low, share_max=high)


def _figures(journals: Sequence[Sequence[_Row]], again: Collection[int]) -> Summary:
    """Return what rows tell. Updates `again` were made once more after a resume."""
    rows = [row for journal in journals for row in journal]
    worked = [row for row in rows if int(row["images"])]
    events = [event for row in rows for event in row["events"].split("; ")]
    peaks, predictions = ([float(row[name]) for row in worked] for name in ("peak_mib", "predicted_mib"))
    budgets = [float(row["budget_mib"]) for row in rows]
    errors = [abs(predicted - peak) / peak * 100 for predicted, peak in zip(predictions, peaks, strict=True) if peak]
    largest = [max(map(int, row["micro_batches"].split())) for row in worked]
    speeds = _speeds(journals) if len(journals) > 1 else [float(s) for row in worked if (s := row["images_per_s"])]
    mean = fmean(peaks) if peaks else None
    repeated = sum(_step(row) in again for row in journals[0])
    return Summary(
        updates=len(journals[0]) - repeated,
        updates_expected=None,
        updates_repeated=repeated,
        images=sum(int(row["images"]) for row in rows if _step(row) not in again),
        images_lost=None,
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
        gpu_utilisation_percent=None,
    )


def _speeds(journals: Sequence[Sequence[_Row]]) -> list[float]:
    """Images a second of all ranks together in each step whose times are known: who is done waits for the last."""
    steps: dict[int, list[_Row]] = {}
    for row in (row for journal in journals for row in journal if int(row["images"])):
        steps.setdefault(_step(row), []).append(row)
    return [
        sum(int(row["images"]) for row in rows) / longest_ms * 1000
        for rows in steps.values()
        if all(row["step_ms"] for row in rows) and (longest_ms := max(float(row["step_ms"]) for row in rows))
    ]


def _kept(rows: Iterable[_Row]) -> list[_Row]:
    """Rows whose update is in the weights: a resume may start an epoch anew, from the checkpoint before it."""
    kept: list[_Row] = []
    for row in rows:
        if RESUMED in row["events"].split("; "):
            while kept and int(kept[-1]["epoch"]) >= int(row["epoch"]):
                kept.pop()
        kept.append(row)
    return kept


def _step(row: _Row) -> int:
    return int(row["step"])


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _span(low: float | None, high: float | None) -> str:
    first, last = f"{low:,.0f}", f"{high:,.0f}"
    return first if first == last else f"{first} to {last}"
