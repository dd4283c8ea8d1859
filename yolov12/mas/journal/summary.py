"""Summarises a whole run in a few numbers and lines, from the rows of its journal or of the journals of all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, median_low, multimode
from typing import Any

from yolov12.mas.journal.explanation import explain

__all__ = ["RESUMED", "WARM_UP_UPDATES", "Summary", "read_summary", "summarise"]

RESUMED = "resumed"
"""Event that the journal adds to the first row after a resume."""

WARM_UP_UPDATES = 10
"""Number of updates after each start that do not tell how long the device waits for data: batches that were loaded
during the warm-up are still there."""

_Row = Mapping[str, str]
# Most ranks that get a line each. With more ranks, only the slowest and the one with most failures are printed.
_LINES = 8


@dataclass(frozen=True)
class Summary:
    """Figures of a whole run, with the parts before a resume. None means that there is no data.

    With several ranks, the figures cover all ranks whose journals were found, and `ranks` has the figures of each rank.
    Steps in which a rank had no images do not count for its memory and speed.
    """

    updates: int
    """Updates that are part of the final weights."""
    updates_expected: int | None
    """Updates that the whole run should have made; None if unknown."""
    updates_repeated: int
    """Updates not counted in `updates`: an interruption undid them, and they were made again after the resume."""
    images: int
    """Images of the updates in `updates`."""
    images_lost: int | None
    """Images that entered a step but did not reach an update; None in `ranks`.

    The batch failed, its gradient was dropped, or the run ended before an update that it should have made. Images after
    the last of all expected updates do not count: Ultralytics makes none for an accumulation that the last batch of a
    training cuts short, with this package or without.
    """
    out_of_memories: int
    """Allocation failures that the run survived."""
    retries: int
    """Attempts that repeated a failed micro-batch unchanged."""
    shrinks: int
    """Steps in which the micro-batch became smaller."""
    grows: int
    """Steps in which the micro-batch became larger."""
    peak_mean_mib: float | None
    """Mean of the measured peaks of allocated memory, in MiB."""
    peak_sd_mib: float | None
    """Standard deviation of the measured peaks, in MiB."""
    peak_max_mib: float | None
    """Highest measured peak, in MiB."""
    over_limit: int
    """Steps whose peak was above `mem_limit`."""
    budget_min_mib: float | None
    """Lowest budget of a step, in MiB."""
    budget_max_mib: float | None
    """Highest budget of a step, in MiB."""
    prediction_error_percent: float | None
    """Median of |predicted - measured| / measured peak, in percent."""
    micro_batch_min: int | None
    """Smallest micro-batch size of the steps. The size of a step is the images in its largest micro-batch."""
    micro_batch_median: int | None
    """Median micro-batch size of the steps."""
    micro_batch_max: int | None
    """Largest micro-batch size of the steps."""
    images_per_s: float | None
    """Median over the steps. With several ranks, a step's images are divided by the slowest rank's own time."""
    gpu_utilisation_percent: float | None
    """Mean of the utilisation samples of rank 0's device, in percent; None in `ranks`."""
    data_wait_percent: float | None = None
    """Part of the time in which devices waited for data, in percent. The first updates of every start and the first of
    every epoch do not count, nor does validation. None if it was not measured."""
    decode_ms: float | None = None
    """Mean time of loader workers for reading and decoding, in milliseconds for an image; None if unknown."""
    augment_ms: float | None = None
    """Mean time of loader workers for everything else, in milliseconds for an image; None if unknown."""
    power_mean_w: float | None = None
    """Mean power in watts: of one GPU, or of a whole Jetson module; None if nothing measured it."""
    temperature_max_c: float | None = None
    """Highest temperature of a GPU in degrees Celsius; None if nothing measured it."""
    rank: int | None = None
    """Index of the rank, in the entries of `ranks`; None elsewhere."""
    share_min: int | None = None
    """Smallest share of the rank in a step with a whole batch, in images; None outside `ranks`."""
    share_max: int | None = None
    """Largest share of the rank in a step with a whole batch, in images; None outside `ranks`."""
    ranks_missing: int = 0
    """Number of ranks whose journals are not in rank 0's folder. They are not part of any figure."""
    ranks: tuple[Summary, ...] = ()
    """Summary of each rank, rank 0 first; empty if there is only one rank."""
    explanation: str = ""
    """What happened to a batch that did not fit, in one line; empty if every batch fitted, and in `ranks`."""

    def as_text(self) -> str:
        """Return the lines to log at the end of a run."""
        lost = _counted(self.images_lost or 0, "image", "images")
        if self.peak_mean_mib is None:
            return f"memory: no step was complete, {lost} lost"
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
            + (f", over the limit in {_counted(self.over_limit, 'step', 'steps')}" if self.over_limit else "")
            + (f"; predicted to {error:.1f} %" if error is not None else "")
            + "\n"
            f"  micro-batches of {self._micro_batches()} images{middle}, {changes}"
            + (f"; {self.images_per_s:,.1f} images/s" if self.images_per_s is not None else "")
            + (f"; {gpu} busy {busy:.0f} % of the time" if busy is not None else "")
            + (f"; {self.power_mean_w:,.0f} W" if self.power_mean_w is not None else "")
            + (f"; at most {self.temperature_max_c:.0f} °C" if self.temperature_max_c is not None else "")
        )
        return "\n  ".join((text, *self._rank_lines())) + (f"\n{self.explanation}" if self.explanation else "")

    def _rank_lines(self) -> list[str]:
        told = list(self.ranks)
        if len(told) > _LINES:
            slowest = min(told, key=lambda each: math.inf if each.images_per_s is None else each.images_per_s)
            told = [slowest]
            fullest = max(self.ranks, key=lambda each: each.out_of_memories)
            if fullest.out_of_memories and fullest is not slowest:
                told = sorted((slowest, fullest), key=self.ranks.index)
        lines = [each._rank_line() for each in told]
        if more := len(self.ranks) - len(told):
            lines.append(f"{more:,} more ranks, of which none was slower or had more out-of-memories")
        if self.ranks_missing:
            journals = _counted(self.ranks_missing, "journal is", "journals are")
            lines.append(f"without what other ranks did: {journals} not in this folder")
        return lines

    def _rank_line(self) -> str:
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


def read_summary(path: Path) -> dict[str, Any]:
    """Read the summary that an earlier part of a run has written.

    Args:
        path: A `memory.json`.

    Returns:
        Name of a field of `Summary` → value. Empty if there is no file, or it is damaged: a run goes on without it.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def summarise(
    journals: Mapping[int, Sequence[_Row]],
    updates_expected: int | None,
    first_step: int,
    images_lost: int,
    busy_percent: float | None,
    ranks_missing: int = 0,
    *,
    is_exact: bool = False,
    bn_group: int | None = None,
) -> Summary:
    """Summarise the rows of memory.csv, and of the files of the other ranks.

    Args:
        journals: Rank → rows as column → text. Updates are counted in the first entry: rank 0, or the only rank.
        updates_expected: Updates expected from `first_step` on; None if unknown.
        first_step: First step since the last resume.
        images_lost: Images that entered a step but did not reach an update.
        busy_percent: Mean GPU utilisation; None if unknown.
        ranks_missing: Number of ranks whose journals are missing.
        is_exact: True if the gradient of a batch does not depend on how it is split into BatchNorm groups.
        bn_group: Number of images that BatchNorm normalises together.
    """
    first = next(iter(journals.values()))
    kept = [_step(row) for row in _valid_rows(first)]
    again = {_step(row) for row in first}.difference(kept)
    if updates_expected is not None:
        updates_expected += sum(step < first_step for step in kept)
    ranks: tuple[Summary, ...] = ()
    if len(journals) > 1:
        whole = _whole_steps(journals.values())
        ranks = tuple(_rank_summary(rank, rows, again, whole) for rank, rows in journals.items())
    return replace(
        _figures(list(journals.values()), again),
        updates_expected=updates_expected,
        images_lost=images_lost,
        gpu_utilisation_percent=busy_percent,
        ranks_missing=ranks_missing,
        ranks=ranks,
        explanation=explain(journals, is_exact=is_exact, bn_group=bn_group),
    )


def _whole_steps(journals: Iterable[Sequence[_Row]]) -> set[int]:
    """Return the steps of usual size. Last batches of epochs and batches of Ultralytics' warm-up have fewer images."""
    images: dict[int, int] = {}
    for row in (row for rows in journals for row in rows):
        images[_step(row)] = images.get(_step(row), 0) + int(row["images"])
    whole = max(multimode(images.values()), default=0)
    return {step for step, count in images.items() if count == whole}


def _rank_summary(rank: int, rows: Sequence[_Row], again: Collection[int], whole: Collection[int]) -> Summary:
    shares = [int(row["images"]) for row in rows if _step(row) in whole]
    low, high = min(shares, default=None), max(shares, default=None)
    return replace(_figures([rows], again), rank=rank, share_min=low, share_max=high)


def _figures(journals: Sequence[Sequence[_Row]], again: Collection[int]) -> Summary:
    """Compute the figures of some rows. Updates in `again` were repeated after a resume."""
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
        over_limit=sum(event.startswith("over the limit") for event in events),
        budget_min_mib=min(budgets, default=None),
        budget_max_mib=max(budgets, default=None),
        prediction_error_percent=median(errors) if errors else None,
        micro_batch_min=min(largest, default=None),
        micro_batch_median=median_low(largest) if largest else None,
        micro_batch_max=max(largest, default=None),
        images_per_s=median(speeds) if speeds else None,
        gpu_utilisation_percent=None,
        data_wait_percent=_data_wait_percent(journals),
        decode_ms=_per_image(rows, "decode_ms"),
        augment_ms=_per_image(rows, "augment_ms"),
        power_mean_w=fmean(watts) if (watts := _known(rows, "power_w")) else None,
        temperature_max_c=max(_known(rows, "temperature_c"), default=None),
    )


def _known(rows: Iterable[_Row], name: str) -> list[float]:
    """Return the values of a column that may be empty, or missing in a file of an earlier version."""
    return [float(value) for row in rows if (value := row.get(name))]


def _per_image(rows: Iterable[_Row], name: str) -> float | None:
    """Return the mean of a time for one image."""
    timed = [row for row in rows if row.get(name) and int(row["images"])]
    images = sum(int(row["images"]) for row in timed)
    return sum(float(row[name]) for row in timed) / images if images else None


def _data_wait_percent(journals: Sequence[Sequence[_Row]]) -> float | None:
    """Return the part of the time in which devices waited for data, after the first updates of each start."""
    waited_ms = whole_ms = 0.0
    for journal in journals:
        since_start = 0
        for row in journal:
            since_start = 1 if RESUMED in row["events"] else since_start + 1
            if since_start > WARM_UP_UPDATES and row.get("data_wait_ms") and row.get("period_ms"):
                waited_ms += float(row["data_wait_ms"])
                whole_ms += float(row["period_ms"])
    return 100 * waited_ms / whole_ms if whole_ms else None


def _speeds(journals: Sequence[Sequence[_Row]]) -> list[float]:
    """Return images/s of all ranks together for each step whose times are known. The slowest rank's time counts."""
    steps: dict[int, list[_Row]] = {}
    for row in (row for journal in journals for row in journal if int(row["images"])):
        steps.setdefault(_step(row), []).append(row)
    return [
        sum(int(row["images"]) for row in rows) / longest_ms * 1000
        for rows in steps.values()
        if all(row["step_ms"] for row in rows) and (longest_ms := max(float(row["step_ms"]) for row in rows))
    ]


def _valid_rows(rows: Iterable[_Row]) -> list[_Row]:
    """Return the rows whose update is in the weights. A resume may repeat an epoch from the checkpoint before it."""
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
