"""Places of the labels of memory.png: lanes above the curves, so that no two overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yolov12.mas.journal.highlights import Highlight

__all__ = ["Label", "place"]

_LANES = 3
# Width of a character and of the gap after a label, as fractions of the panel's width: 9 points on about 1,100 pixels.
_CHARACTER, _GAP = 0.0063, 0.015


@dataclass(frozen=True)
class Label:
    """A highlight and its place."""

    highlight: Highlight
    lane: int
    """Lane, from 0 at the top."""
    left: float
    """Left end, as a fraction of the panel's width."""
    right: float
    """Right end, as a fraction of the panel's width."""
    before: bool
    """True if the text ends at its step, False if it begins there."""


def place(found: Sequence[Highlight], first_step: float, last_step: float) -> list[Label]:
    """Give each highlight a lane, the most important ones first. Those that find no room are left out.

    Args:
        found: Highlights to show.
        first_step: Step at the left edge of the panel.
        last_step: Step at its right edge.
    """
    placed: list[Label] = []
    for each in sorted(found, key=lambda each: (-each.importance, each.step)):
        at = (each.step - first_step) / (last_step - first_step)
        width = len(each.text) * _CHARACTER + _GAP
        before = at + width > 1
        left, right = (at - width, at) if before else (at, at + width)
        for lane in range(_LANES):
            others = [label for label in placed if label.lane == lane]
            if left >= 0 and all(right <= label.left or left >= label.right for label in others):
                placed.append(Label(each, lane, left, right, before))
                break
    return placed
