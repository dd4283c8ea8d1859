"""What is said of a training whose batch did not fit: how the batch ran instead, from the rows of the journals.

The line at the end of a run and the title of memory.png are made of the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["DID_NOT_FIT", "SHARE_DID_NOT_FIT", "Unfit", "explain", "find_unfit"]

DID_NOT_FIT, SHARE_DID_NOT_FIT = "batch of {} did not fit", "share of {} did not fit"
"""Event of the first batch, or of the first share of a rank, with so many images that did not fit at once with
everything kept."""

_Row = Mapping[str, str]
_EVENT = re.compile(r"(batch|share) of (\d+) did not fit")


def explain(journals: Mapping[int, Sequence[_Row]], *, is_exact: bool, bn_group: int | None) -> str:
    """Return a line such as `batch=64 did not fit into the budget of 1.1 GiB: ran as 4 × 16, the same gradient`.

    Args:
        journals: Rank → rows of memory.csv as column → text.
        is_exact: True if the gradient of a batch does not depend on how it is split into BatchNorm groups.
        bn_group: Number of images that BatchNorm normalises together; None or 0 for no groups.

    Returns:
        The line; empty if every batch fitted.
    """
    unfit = find_unfit(journals)
    if unfit is None:
        return ""
    gradient = _gradient([row for journal in journals.values() for row in journal], is_exact, bn_group)
    return f"{unfit.what}{unfit.often}: {unfit.ran}{gradient}"


@dataclass(frozen=True)
class Unfit:
    """Batches that did not fit at once with everything kept."""

    what: str
    """What did not fit into which budget, as the beginning of a sentence."""
    often: str
    """In how many batches, with a space before it; empty for all of them."""
    ran: str
    """How they ran, such as `ran as 4 × 16`."""


def find_unfit(journals: Mapping[int, Sequence[_Row]]) -> Unfit | None:
    """Find the largest batches that did not fit; None if every batch fitted.

    Args:
        journals: Rank → rows of memory.csv as column → text.
    """
    rows = [row for journal in journals.values() for row in journal]
    unfit = [found for row in rows for event in _events(row) if (found := _EVENT.fullmatch(event))]
    if not unfit:
        return None
    # The journals of ranks on other machines may be elsewhere.
    images, is_shared = max(int(each[2]) for each in unfit), any(each[1] == "share" for each in unfit)
    # A rank's share changes from step to step, so its rows do not tell where a batch ends: each counts as one.
    batches = [(sizes, row) for row in rows for sizes in ([_sizes(row)] if is_shared else _batches(row, images))]
    tight = [(sizes, row) for sizes, row in batches if len(sizes) > 1 or row["plan"]]
    if not tight:
        return None
    budget = _span((float(row["budget_mib"]) / 1024 for _, row in tight), ".1f")
    subject = "the share of a rank" if is_shared else f"batch={images}"
    often = "" if len(tight) == len(batches) else f" in {len(tight):,} of {len(batches):,} batches"
    how = "in micro-batches of " + _span(max(sizes) for sizes, _ in tight) if is_shared else _how([s for s, _ in tight])
    if any(row["plan"] for _, row in tight):
        how += " with layers recomputed"
    return Unfit(f"{subject} did not fit into the budget of {budget} GiB", often, f"ran {how}")


def _gradient(rows: Sequence[_Row], is_exact: bool, bn_group: int | None) -> str:
    """Return what is true of the gradient in all rows; empty if images were changed, or nothing is known.

    Images stay smaller until an event says otherwise, so such an event in any row counts.
    """
    if not is_exact or not bn_group or any(event.startswith("image size") for row in rows for event in _events(row)):
        return ""
    smaller = {row["step"] for row in rows if any(event.startswith("groups of") for event in _events(row))}
    if smaller:
        steps = f"{len(smaller):,} step{'s' * (len(smaller) > 1)}"
        return f", the same gradient but for smaller BatchNorm groups in {steps}"
    return f", the same gradient (BatchNorm in groups of {bn_group})"


def _how(batches: Sequence[Sequence[int]]) -> str:
    parts, sizes = {len(batch) for batch in batches}, {size for batch in batches for size in batch}
    if parts == {1}:
        return "at once"
    if len(parts) == len(sizes) == 1:
        return f"as {min(parts)} × {min(sizes)}"
    return f"as {_span(parts)} parts of {_span(sizes)} images"


def _batches(row: _Row, images: int) -> Iterator[list[int]]:
    """Yield the micro-batches of each batch of a step that has so many images; a last batch of an epoch has fewer."""
    batch: list[int] = []
    for size in _sizes(row):
        batch.append(size)
        if sum(batch) == images:
            yield batch
            batch = []


def _sizes(row: _Row) -> list[int]:
    return [int(size) for size in row["micro_batches"].split()]


def _events(row: _Row) -> list[str]:
    return row["events"].split("; ")


def _span(values: Iterable[float], spec: str = ",") -> str:
    found = list(values)
    low, high = format(min(found), spec), format(max(found), spec)
    return low if low == high else f"{low} to {high}"
