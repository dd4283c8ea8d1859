"""The conclusion of a run in one sentence, and its figures in a second one: the title of memory.png.

All functions are pure: they look at rows of memory.csv and at nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from yolov12.mas.journal.explanation import Unfit, find_unfit
from yolov12.mas.journal.highlights import TOOK, as_split, highlights, size
from yolov12.mas.journal.summary import RESUMED, summarise

__all__ = ["Facts", "facts_of", "fraction", "in_percent"]

_Row = Mapping[str, str]

# Peaks up to this fraction of the budget leave so much room that memory decided nothing.
_ROOMY = 0.5


def fraction(row: _Row) -> float:
    """Return the peak of a row over its budget; 0 without a budget."""
    budget = float(row["budget_mib"])
    return float(row["peak_mib"]) / budget if budget > 0 else 0.0


@dataclass(frozen=True)
class Facts:
    """What memory did to a run, over all its ranks."""

    updates: int
    batch: int
    """Images of the usual batch, of all ranks together."""
    ranks: int
    split: str
    """How the usual batch ran on rank 0: `64 whole` or `4 × 16`."""
    sizes: tuple[int, int]
    """Images in the smallest and in the largest micro-batch of the steps with usual batches."""
    tightest: _Row
    """Row with the highest peak over budget."""
    took_mib: float
    """Difference between the highest and the lowest budget."""
    out_of_memories: int
    over_limit: int
    smallest_pixels: float
    """Size of the smallest images if images were reduced, otherwise infinity."""
    waits: int
    resumes: int
    planned: bool
    """True if layers were recomputed or rebuilt in any step."""
    shrinks: int
    unfit: Unfit | None
    """Batches that did not fit; None if every batch fitted."""
    images_per_s: float | None

    @property
    def percent(self) -> float:
        """Highest peak over budget, in per cent."""
        return 100 * fraction(self.tightest)

    @property
    def roomy(self) -> bool:
        """True if memory was never tight, so that a picture of the budget would be an empty field."""
        troubles = self.out_of_memories + self.over_limit + self.waits + self.shrinks
        return not troubles and not self.planned and self.smallest_pixels == math.inf and self.percent <= 100 * _ROOMY

    def headline(self) -> str:
        """Return the conclusion as one sentence. Of several, the gravest."""
        batches = f"batches of {self.batch:,}"
        if self.over_limit:
            return f"The peak was above the memory limit in {_counted(self.over_limit, 'step')}"
        if self.smallest_pixels < math.inf:
            return f"Memory was so short that images were reduced to {self.smallest_pixels:.0f} pixels"
        if self.out_of_memories:
            failures = _counted(self.out_of_memories, "out-of-memory", "out-of-memories")
            return f"The run survived {failures}: {batches} {self._ran()}"
        if self.roomy:
            return f"Memory was never tight: the peak was at most {in_percent(self.percent)} of the budget"
        if self.took_mib and self.shrinks:
            return f"Other processes took up to {size(self.took_mib)}: {batches} {self._ran()}"
        if self.unfit is not None:
            return f"{self.unfit.what}: {self.unfit.ran}"
        how = f"{batches.capitalize()} {self._ran()}" if "×" in self.split else "Every batch fitted as a whole"
        return f"{how}: the peak was at most {in_percent(self.percent)} of the budget"

    def _ran(self) -> str:
        low, high = self.sizes
        plan = " with checkpointing" if self.planned else ""
        if low != high:
            return f"ran in micro-batches of {low:,} to {high:,}{plan}"
        if self.ranks > 1:
            return f"ran in micro-batches of {high:,}{plan}"
        return f"ran {'as' if '×' in self.split else 'in'} {self.split}{plan}"

    def _budget(self) -> str:
        return size(float(self.tightest["budget_mib"]))

    def details(self) -> str:
        """Return the figures of the run in one line."""
        ranks = f"{self.ranks} ranks" if self.ranks > 1 else f"mostly run as {self.split}"
        parts = [
            _counted(self.updates, "update"),
            f"batch of {self.batch:,}, {ranks}",
            f"peak at most {in_percent(self.percent)} of the budget ({self._peak()} of {self._budget()})",
        ]
        if self.images_per_s:
            parts.append(f"{self.images_per_s:,.0f} images/s")
        if self.resumes:
            parts.append(f"resumed {'once' if self.resumes == 1 else f'{self.resumes} times'}")
        return " · ".join(parts)

    def _peak(self) -> str:
        return size(float(self.tightest["peak_mib"]))


def facts_of(journals: Mapping[int, Sequence[_Row]]) -> Facts:
    """Collect the facts of a run.

    Args:
        journals: Rank → rows, as `read_ranks` returns them. At least one rank has at least one row.
    """
    journals = {rank: rows for rank, rows in journals.items() if rows}
    rows = [row for journal in journals.values() for row in journal]
    events = [event for row in rows for event in row["events"].split("; ")]
    first = next(iter(journals.values()))
    summary = summarise(journals, None, 1, 0, None)
    images = Counter[str]()
    for row in rows:
        images[row["step"]] += int(row["images"])
    batch = Counter(images.values()).most_common(1)[0][0]
    usual = {rank: [row for row in _settled(rows) if images[row["step"]] == batch] for rank, rows in journals.items()}
    largest = [
        max(map(int, row["micro_batches"].split())) for of in usual.values() for row in of if row["micro_batches"]
    ]
    splits = Counter(row["micro_batches"] for row in usual[next(iter(usual))] or first)
    return Facts(
        updates=summary.updates,
        batch=batch,
        ranks=len(journals),
        split=as_split(splits.most_common(1)[0][0]),
        sizes=(min(largest, default=0), max(largest, default=0)),
        tightest=max(rows, key=fraction),
        took_mib=max(map(_taken_mib, journals.values())),
        out_of_memories=summary.out_of_memories,
        over_limit=summary.over_limit,
        smallest_pixels=min(map(_reduced_to, events)),
        waits=sum(event.startswith("waited") for event in events),
        resumes=sum(RESUMED in row["events"] for row in first),
        planned=any(row["plan"] for row in rows),
        shrinks=summary.shrinks,
        unfit=find_unfit(journals),
        images_per_s=summary.images_per_s,
    )


def _settled(rows: Sequence[_Row]) -> Sequence[_Row]:
    """Return the rows without the first two steps, which run in small micro-batches while the memory is measured."""
    return rows[2:] if len(rows) > 10 else rows


def _taken_mib(rows: Sequence[_Row]) -> float:
    if all(each.kind != TOOK for each in highlights(rows)):
        return 0
    budgets = [float(row["budget_mib"]) for row in rows]
    return max(budgets) - min(budgets)


def _reduced_to(event: str) -> float:
    """Return the pixels of the images after an event that reduced them, and infinity after any other."""
    if not event.startswith("image size"):
        return math.inf
    before, after = (int(word) for word in event.split() if word.isdecimal())
    return after if after < before else math.inf


def in_percent(value: float) -> str:
    """Return a number of per cent as text, with a decimal if it is small."""
    return f"{value:.1f} %" if value < 10 else f"{value:.0f} %"


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
