"""Colours, markers and small parts that the panels of memory.png share.

The colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart
(https://jfly.uni-koeln.de/color/). Curves also differ in their line style, ranks and events in their markers, so the
picture reads in grey, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from yolov12.mas.journal.highlights import RESUMED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from yolov12.mas.journal.labels import Label

__all__ = [
    "BLACK",
    "BLUE",
    "DOTTED_STEPS",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILION",
    "caption",
    "dot",
    "has_event",
    "hits",
    "label_steps",
    "limits",
    "mark",
    "running_median",
    "steps_of",
]

_Row = Mapping[str, str]

BLACK, BLUE, ORANGE, SKY = "#000000", "#0072B2", "#E69F00", "#56B4E9"
VERMILION, GREEN, PURPLE = "#D55E00", "#009E73", "#CC79A7"
DOTTED_STEPS = 40
"""Most steps for which each gets a dot. A line through a single step would be invisible."""

_LANE = 0.085  # height of a lane of labels, as a fraction of the panel


def label_steps(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels above the curves, each with a thin line down to its step."""
    for label in sorted(labels, key=lambda label: label.lane):  # the text of a lower lane covers lines from above
        resumed = label.highlight.kind == RESUMED  # has a line of its own, between two steps
        step, side = label.highlight.step - 0.5 * resumed, 1 if label.before else 0
        line = {"arrowstyle": "-", "linestyle": ":", "color": "0.35", "relpos": (side, 0.5), "shrinkB": 0}
        axes.annotate(
            f"{label.highlight.text} " if label.before else f" {label.highlight.text}",
            xy=(step, 0),
            xytext=(step, 1 - _LANE * (label.lane + 0.5)),
            xycoords=axes.get_xaxis_transform(),
            ha="right" if label.before else "left",
            va="center",
            fontsize=9,
            zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops=None if resumed else line,
        )


def limits(axes: Axes, top: float, labels: Sequence[Label] = ()) -> None:
    """Let the panel begin at 0 and end above `top`, with room for the lanes of the labels."""
    lanes = max((label.lane + 1 for label in labels), default=0)
    axes.set_ylim(0, top * 1.06 / (1 - _LANE * lanes))


def mark(axes: Axes, rows: Sequence[_Row], prefix: str, heights: Sequence[float], **style: Any) -> None:
    """Mark the steps with an event."""
    found = hits(rows, prefix)
    if found:
        places = [int(rows[index]["step"]) for index in found], [heights[index] for index in found]
        axes.scatter(*places, s=85, zorder=5, **{"edgecolor": "white", "linewidth": 0.7, **style})


def caption(axes: Axes, title: str, unit: str) -> None:
    """Write the title, the unit and the legend, which is beside the title, where it hides nothing."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_ylabel(unit)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6, frameon=False, fontsize=9, columnspacing=1.5,
            handlelength=2.6,
        )  # fmt: skip


def hits(rows: Sequence[_Row], prefix: str) -> list[int]:
    """Return the indices of the rows with an event that begins with `prefix`."""
    return [index for index, row in enumerate(rows) if has_event(row, prefix)]


def has_event(row: _Row, prefix: str) -> bool:
    """Return True if an event of the row begins with `prefix`."""
    return any(event.startswith(prefix) for event in row["events"].split("; "))


def steps_of(rows: Sequence[_Row]) -> list[int]:
    """Return the step numbers of rows."""
    return [int(row["step"]) for row in rows]


def dot(rows: Sequence[object]) -> str:
    """Return the marker of each step: a dot in a short run, nothing in a long one."""
    return "o" if len(rows) <= DOTTED_STEPS else ""


def running_median(values: Sequence[float]) -> list[float]:
    """Return the medians of the values around each value."""
    reach = max(2, len(values) // 100)
    return [median(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]
