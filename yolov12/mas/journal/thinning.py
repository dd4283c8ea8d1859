"""Choice of the steps of a long run that are drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

__all__ = ["thin", "thin_all"]

_Row = Mapping[str, str]

# Parts into which a long run is divided, with up to three steps drawn for each, and some with events. With more lines
# than pixels, the picture would be a solid band.
_BINS = 600
_PER_KIND = 3


def thin(rows: Sequence[_Row], bins: int = _BINS) -> list[_Row]:
    """Choose the rows of a long run to draw.

    The run is divided into `bins` equal parts. From each part, the steps with the highest peak, the lowest budget and
    the median speed are drawn, and the first three steps with each kind of event. Whole rows are chosen, so everything
    drawn at a step happened at that step.

    Args:
        rows: Rows, as `read_rows` returns them.
        bins: Number of parts. A run with at most as many rows is drawn completely.
    """
    if len(rows) <= bins:
        return list(rows)
    width = math.ceil(len(rows) / bins)
    chosen: set[int] = set()
    for start in range(0, len(rows), width):
        stretch = range(start, min(start + width, len(rows)))
        kinds = Counter[str]()
        for index in stretch:
            for event in filter(None, rows[index]["events"].split("; ")):
                kind = event.partition(" ")[0]
                kinds[kind] += 1
                if kinds[kind] <= _PER_KIND:
                    chosen.add(index)
        chosen.add(max(stretch, key=lambda index: float(rows[index]["peak_mib"])))
        chosen.add(min(stretch, key=lambda index: float(rows[index]["budget_mib"])))
        timed = [index for index in stretch if rows[index]["images_per_s"]]
        if timed:
            chosen.add(sorted(timed, key=lambda index: float(rows[index]["images_per_s"]))[len(timed) // 2])
    return [rows[index] for index in sorted(chosen)]


def thin_all(journals: Mapping[int, Sequence[_Row]]) -> dict[int, Sequence[_Row]]:
    """Choose the rows of a long run to draw, the same steps for all ranks.

    Args:
        journals: Rank → rows.
    """
    if max(map(len, journals.values())) <= _BINS:
        return dict(journals)
    bins = max(_BINS // len(journals), _BINS // 10) if len(journals) > 1 else _BINS
    steps = {int(row["step"]) for rows in journals.values() for row in thin(rows, bins)}
    return {rank: [row for row in rows if int(row["step"]) in steps] for rank, rows in journals.items()}
