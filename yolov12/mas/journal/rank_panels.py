"""Panels of memory.png for a run of several processes: each rank has its own colour and its own marker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from yolov12.mas.journal.style import (
    BLACK,
    BLUE,
    DOTTED_STEPS,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    caption,
    dot,
    has_event,
    label_steps,
    limits,
    mark,
    running_median,
    steps_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from yolov12.mas.journal.labels import Label

__all__ = ["draw_memory", "draw_shares", "draw_speed", "rank_colors"]

_Row = Mapping[str, str]

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK, "#8C8C8C")  # more ranks use a colour scale
_MARKERS = "osDphP*<"
_MARKERS_PER_LINE = 12


def rank_colors(ranks: Iterable[int]) -> dict[int, Any]:
    """Return a colour for each rank."""
    from matplotlib import colormaps

    ranks = list(ranks)
    if len(ranks) <= len(_COLORS):
        return dict(zip(ranks, _COLORS, strict=False))
    return {rank: colormaps["viridis"](0.92 * index / (len(ranks) - 1)) for index, rank in enumerate(ranks)}


def draw_memory(
    axes: Axes,
    journals: Mapping[int, Sequence[_Row]],
    colors: Mapping[int, Any],
    labels: Sequence[Label],
    *,
    budget: bool,
) -> None:
    """Draw peak and budget of each rank in GiB, and say what happened.

    Args:
        axes: Panel to draw in.
        journals: Rank → rows of the steps to draw.
        colors: Rank → colour.
        labels: What to say.
        budget: Draw the budgets. Where they are far above the peaks, these would be flat lines under an empty field.
    """
    few, top = len(journals) <= len(_COLORS), 0.001
    for rank, rows in journals.items():
        worked = [row for row in rows if int(row["images"])]
        peaks = [float(row["peak_mib"]) / 1024 for row in worked]
        budgets = [float(row["budget_mib"]) / 1024 for row in rows] if budget else []
        style = {"color": colors[rank], "alpha": 1 if few else 0.8}
        if budget:
            axes.plot(steps_of(rows), budgets, "--", linewidth=0.8, **style)
        axes.plot(steps_of(worked), peaks, linewidth=1.5 if few else 1.0, **style, **_markers(colors, rank, worked))
        mark(axes, worked, "out-of-memory", peaks, marker="X", color=colors[rank], **_EDGE)
        top = max(top, *budgets, *peaks, 0)
    resumed = sorted(
        {int(row["step"]) - 0.5 for rows in journals.values() for row in rows if has_event(row, "resumed")}
    )
    if resumed:
        axes.vlines(resumed, 0, 1, "0.3", "-.", transform=axes.get_xaxis_transform())
    _legend_entry(axes, "measured peak", linewidth=1.5)
    if budget:
        _legend_entry(axes, "budget", linestyle="--", linewidth=0.8)
    if resumed:
        _legend_entry(axes, "resumed", linestyle="-.")
    _event_legend_entry(axes, journals, "out-of-memory", "X", "out-of-memory, survived")
    _rank_legend(axes, colors)
    label_steps(axes, labels)
    limits(axes, top, labels)
    caption(axes, "Memory of each rank" if budget else "Peak of each step, far below the budget", "GiB")


def draw_shares(
    axes: Axes, journals: Mapping[int, Sequence[_Row]], colors: Mapping[int, Any], *, every_step: bool
) -> None:
    """Draw the shares as stacked bands, which add up to the batch. Lines of equal shares would hide each other.

    Args:
        axes: Panel to draw in.
        journals: Rank → rows of the steps to draw.
        colors: Rank → colour.
        every_step: True if these are all steps of the run.
    """
    images = {rank: {int(row["step"]): int(row["images"]) for row in rows} for rank, rows in journals.items()}
    below = dict.fromkeys(sorted(step for of_rank in images.values() for step in of_rank), 0)
    steps = list(below)
    # It is chance which of the smaller last batches of epochs are among the steps drawn, so they are left out.
    if not every_step:
        whole = [sum(of_rank.get(step, 0) for of_rank in images.values()) for step in steps]
        dips = [index for index in range(1, len(steps) - 1) if whole[index] < min(whole[index - 1], whole[index + 1])]
        steps = [step for index, step in enumerate(steps) if index not in set(dips)]
    width = 1.4 if len(journals) <= len(_COLORS) else 0.5
    for rank, rows in journals.items():
        above = {step: count + images[rank].get(step, 0) for step, count in below.items()}
        low, high = [below[step] for step in steps], [above[step] for step in steps]
        axes.fill_between(steps, low, high, step="mid", color=colors[rank], alpha=0.35, linewidth=0)
        style = {"color": colors[rank], "linewidth": width}
        axes.step(steps, high, where="mid", **style, **_markers(colors, rank, steps))
        middles = [(above[step] + below[step]) / 2 for step in steps_of(rows)]
        mark(axes, rows, "shrunk", middles, marker="v", color=colors[rank], **_EDGE)
        mark(axes, rows, "grew", middles, marker="^", color=colors[rank], **_EDGE)
        below = above
    axes.set_ylim(0, max(*below.values(), 1) * 1.08)
    _event_legend_entry(axes, journals, "shrunk", "v", "micro-batch shrunk")
    _event_legend_entry(axes, journals, "grew", "^", "micro-batch grew")
    caption(axes, "Share of each rank in the batch", "images")


def draw_speed(axes: Axes, journals: Mapping[int, Sequence[_Row]], colors: Mapping[int, Any]) -> None:
    """Draw images/s of each rank's own work, as a running median in a long run."""
    top = 1.0
    for rank, rows in journals.items():
        timed = [row for row in rows if row["images_per_s"] and int(row["images"])]
        speeds = [float(row["images_per_s"]) for row in timed]
        if len(timed) > DOTTED_STEPS:
            speeds = running_median(speeds)
        axes.plot(steps_of(timed), speeds, color=colors[rank], linewidth=1.4, **_markers(colors, rank, timed))
        top = max(top, *speeds, 0)
    axes.set_ylim(0, top * 1.1)
    smooth = any(len(rows) > DOTTED_STEPS for rows in journals.values())
    caption(axes, "Speed of each rank's own work" + (", running median" if smooth else ""), "images/s")


_EDGE: Mapping[str, Any] = {"edgecolor": BLACK, "linewidth": 0.9}


def _markers(colors: Mapping[int, Any], rank: int, points: Sequence[object]) -> dict[str, Any]:
    """Return the markers of a rank's line: a shape of its own, a few along the line, at other places for each rank."""
    if len(colors) > len(_MARKERS):
        return {"marker": dot(points), "ms": 4}
    index, every = list(colors).index(rank), max(1, len(points) // _MARKERS_PER_LINE)
    return {"marker": _MARKERS[index], "ms": 5, "markevery": (index * every // len(colors), every)}


def _rank_legend(axes: Axes, colors: Mapping[int, Any]) -> None:
    """Draw a legend of the ranks above the place of the other legend. With many ranks it names only some of them."""
    from matplotlib.lines import Line2D

    every = math.ceil(len(colors) / len(_COLORS))
    ranks = [rank for index, rank in enumerate(colors) if index % every == 0 or index == len(colors) - 1]
    lines = [
        Line2D([], [], label=f"rank {rank}", color=colors[rank], linewidth=4, **{**_markers(colors, rank, ()), "ms": 8})
        for rank in ranks
    ]
    legend = axes.legend(
        handles=lines, loc="lower right", bbox_to_anchor=(1, 1.06), ncols=len(ranks), frameon=False, fontsize=9
    )
    axes.add_artist(legend)  # otherwise the next legend would replace it
    legend.set_clip_on(False)  # otherwise the layout would leave no room for it


def _legend_entry(axes: Axes, label: str, **style: Any) -> None:
    """Add a legend entry in grey for something that is drawn in the colours of the ranks."""
    axes.plot([], [], label=label, **{"color": "0.3", **style})


def _event_legend_entry(
    axes: Axes, journals: Mapping[int, Sequence[_Row]], prefix: str, marker: str, label: str
) -> None:
    if any(has_event(row, prefix) for rows in journals.values() for row in rows):
        _legend_entry(axes, label, linestyle="", marker=marker, ms=9, markerfacecolor="white", markeredgecolor=BLACK)
