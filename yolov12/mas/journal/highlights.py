"""What happened in a run, in words: the labels of memory.png and the last lines of `yolov12 monitor`.

All functions are pure: they look at rows of memory.csv and at nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["MARKED", "RESUMED", "TOOK", "Highlight", "as_split", "choose", "highlights", "highlights_of_ranks", "size"]

_Row = Mapping[str, str]

# Smallest change of the budget that is told, as a fraction of the largest budget. Smaller ones are of this process too:
# libraries load, and data workers start.
_SWING = 0.1
# Steps within which two changes of the budget are one, and within which a smaller micro-batch is its consequence.
_TOGETHER = 2
_PER_KIND = 3

OUT_OF_MEMORY, SHRUNK, GREW, RESUMED, TOOK = "out-of-memory", "shrunk", "grew", "resumed", "took"
MARKED = (OUT_OF_MEMORY, SHRUNK, GREW, RESUMED)
"""Kinds of events that memory.png marks on its curves, each by a marker of its own."""


@dataclass(frozen=True)
class Highlight:
    """Something that happened in one step."""

    step: int
    kind: str
    """Kind, such as `out-of-memory`, `took` or `image size`."""
    text: str
    """What happened, for a reader who does not know the journal."""
    importance: float
    """Highlights with a higher number are shown first."""


def size(mib: float) -> str:
    """Return a number of MiB as people say it: `125 GiB`, `1.8 GiB`, `310 MiB`."""
    if mib < 1024:
        return f"{mib:.0f} MiB"
    return f"{mib / 1024:.0f} GiB" if mib >= 10 * 1024 else f"{mib / 1024:.1f} GiB"


def as_split(micro_batches: str) -> str:
    """Return how a batch ran: `one micro-batch`, `4 × 16` or `2 × 256 + 128`; empty for an empty share.

    Args:
        micro_batches: The column of that name.
    """
    counts = Counter(int(images) for images in micro_batches.split())
    if sum(counts.values()) == 1:
        return "one micro-batch"
    parts = sorted(counts.items(), reverse=True)
    return " + ".join(f"{count} × {images}" if count > 1 else str(images) for images, count in parts)


def highlights(rows: Sequence[_Row]) -> list[Highlight]:
    """Return everything worth telling about a run, or about one rank of it, in the order of the steps.

    Args:
        rows: Rows, as `read_rows` returns them.
    """
    events = list(_events(rows))
    shrinks: dict[int, list[Highlight]] = {}
    for each in events:
        if each.kind == SHRUNK:
            shrinks.setdefault(each.step, []).append(each)
    swings = []
    for each in _swings(rows):
        # A smaller micro-batch right after other processes took memory is the second half of one story.
        near = range(each.step, each.step + _TOGETHER + 1) if each.kind == TOOK else ()
        if then := [shrunk for step in near for shrunk in shrinks.pop(step, ())]:
            each = replace(each, text=f"{each.text}: {then[0].text}", importance=each.importance + 1)
        swings.append(each)
    found = [each for each in events if each.kind != SHRUNK or each.step in shrinks]
    return sorted([*found, *swings], key=lambda each: (each.step, -each.importance))


def highlights_of_ranks(journals: Mapping[int, Sequence[_Row]]) -> list[Highlight]:
    """Return the highlights of all ranks. A text begins with the rank, unless it is true of all of them.

    Args:
        journals: Rank → rows, as `read_ranks` returns them.
    """
    ranks: dict[Highlight, dict[int, None]] = {}
    for rank, rows in journals.items():
        for each in highlights(rows):
            ranks.setdefault(each, {})[rank] = None
    told = [
        each if len(of) == len(journals) else replace(each, text=f"rank {next(iter(of))}: {each.text}")
        for each, of in ranks.items()
    ]
    return sorted(told, key=lambda each: (each.step, -each.importance))


def choose(found: Sequence[Highlight], most: int) -> list[Highlight]:
    """Choose the most important highlights: at most three of each kind. The first of a kind says how many there are.

    Args:
        found: All highlights.
        most: Largest number to return.

    Returns:
        The chosen ones, in the order of the steps.
    """
    total, taken = Counter(each.kind for each in found), Counter[str]()
    chosen: list[Highlight] = []
    for each in sorted(found, key=lambda each: (-each.importance, each.step)):
        if taken[each.kind] == _PER_KIND or len(chosen) == most:
            continue
        if not taken[each.kind] and total[each.kind] > _PER_KIND:
            each = replace(each, text=f"{each.text} (in {total[each.kind]:,} steps)")
        taken[each.kind] += 1
        chosen.append(each)
    return sorted(chosen, key=lambda each: each.step)


def _events(rows: Sequence[_Row]) -> Iterator[Highlight]:
    """Put the events of the rows into words. An event that is repeated step after step is told once."""
    told: dict[str, str] = {}
    if rows and rows[0]["plan"]:
        yield Highlight(int(rows[0]["step"]), "plan", "checkpointing from the start", 6)
    for row in rows:
        now: dict[str, str] = {}
        for event in filter(None, row["events"].split("; ")):
            words = _in_words(event, row)
            if words is None:
                continue
            kind, text, importance = words
            now[kind] = text
            if kind in MARKED or told.get(kind) != text:
                yield Highlight(int(row["step"]), kind, text, importance)
        told = now


def _in_words(event: str, row: _Row) -> tuple[str, str, float] | None:
    """Return kind, text and importance of an event; None if another event of the step says the same."""
    first, last = ([int(number) for number in re.findall(r"\d+", event.replace(",", ""))] + [0, 0])[:2]
    if event.startswith("out-of-memory at"):
        return OUT_OF_MEMORY, f"out of memory at {first} images, survived", 9
    if event.startswith("out-of-memory"):
        return OUT_OF_MEMORY, f"out of memory{event.removeprefix('out-of-memory')}, survived", 9
    if event.startswith("over the limit"):
        return "over the limit", f"peak above the limit of {size(first)}", 10
    if event.startswith("image size"):
        if last < first:
            return "image size", f"images reduced from {first} to {last} pixels", 10
        return "images enlarged", f"images enlarged from {first} to {last} pixels", 5
    if event.startswith("groups of"):
        return "groups", f"BatchNorm in groups of {first}", 8
    if event.startswith("waited"):
        return "waited", f"waited {first} s for other processes", 7
    if event.startswith("resumed"):
        return RESUMED, "resumed after an interruption", 7
    if event.startswith("plan"):
        if first and last:
            return "another plan", f"checkpointing {'more' if last > first else 'fewer'} layers", 2
        return ("plan off", "checkpointing ended", 4) if first else ("plan", "checkpointing started", 6)
    if event.startswith("shrunk"):
        return SHRUNK, f"batch split into {as_split(row['micro_batches'])}", 5 + min(first / max(last, 1), 8) / 8
    if event.startswith("grew"):
        return GREW, f"batch ran as {as_split(row['micro_batches'])}", 3
    return None


def _swings(rows: Sequence[_Row]) -> list[Highlight]:
    """Return where the budget fell or rose by much: other processes took or released memory."""
    budgets = [float(row["budget_mib"]) for row in rows]
    most = max(budgets, default=0.0)
    least, before = _SWING * most, 0.0
    swings: list[tuple[int, int, float]] = []  # first and last step, change in MiB
    for row, budget in zip(rows, budgets, strict=True):
        step, change = int(row["step"]), budget - before
        if row is rows[0] or "resumed" in row["events"]:
            before = budget
        elif swings and step - swings[-1][1] <= _TOGETHER and change * swings[-1][2] > 0:
            swings[-1] = swings[-1][0], step, swings[-1][2] + change
            before = budget
        elif abs(change) >= least > 0:
            swings.append((step, step, change))
            before = budget
    return [
        Highlight(first, TOOK, f"other processes took {size(-change)}", 6 - change / most)
        if change < 0
        else Highlight(first, "released", f"other processes released {size(change)}", 2 + change / most)
        for first, _, change in swings
    ]
