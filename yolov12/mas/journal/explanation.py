"""One line on a training whose batch did not fit: how the batch ran instead, from the rows of the journals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["DID_NOT_FIT", "explain"]

DID_NOT_FIT = "batch of {} did not fit"
"""Event of the first batch with so many images that did not fit at once with everything kept."""

_Row = Mapping[str, str]
_EVENT = re.compile(DID_NOT_FIT.format(r"(\d+)"))


def explain(journals: Mapping[int, Sequence[_Row]], *, is_exact: bool, bn_group: int | None) -> str:
    """Return a line such as `batch=64 did not fit into the budget of 1.1 GiB: ran as 4 × 16, the same gradient`.

    Args:
        journals: Rank → rows of memory.csv as column → text.
        is_exact: True if the gradient of a batch does not depend on how it is split into BatchNorm groups.
        bn_group: Number of images that BatchNorm normalises together; None or 0 for no groups.

    Returns:
        The line; empty if every batch fitted.
    """
    rows = [row for journal in journals.values() for row in journal]
    unfit = [int(found[1]) for row in rows for event in _events(row) if (found := _EVENT.fullmatch(event))]
    if not unfit:
        return ""
    images, is_shared = max(unfit), len(journals) > 1
    # A rank's share changes from step to step, so its rows do not tell where a batch ends: each counts as one.
    batches = [(sizes, row) for row in rows for sizes in ([_sizes(row)] if is_shared else _batches(row, images))]
    tight = [(sizes, row) for sizes, row in batches if len(sizes) > 1 or row["plan"]]
    if not tight:
        return ""
    budget = _span((float(row["budget_mib"]) / 1024 for _, row in tight), ".1f")
    subject = "the share of a rank" if is_shared else f"batch={images}"
    often = "" if len(tight) == len(batches) else f" in {len(tight):,} of {len(batches):,} batches"
    how = "in micro-batches of " + _span(max(sizes) for sizes, _ in tight) if is_shared else _how([s for s, _ in tight])
    if any(row["plan"] for _, row in tight):
        how += " with layers recomputed"
    return (
        f"{subject} did not fit into the budget of {budget} GiB{often}: ran {how}"
        f"{_gradient([row for _, row in tight], is_exact, bn_group)}"
    )


def _gradient(rows: Sequence[_Row], is_exact: bool, bn_group: int | None) -> str:
    """Return what is true of the gradient; empty if batches or images were changed, or nothing is known."""
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
