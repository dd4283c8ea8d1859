"""Panels of memory.png for a run of one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from yolov12.mas.journal.conclusion import fraction, in_percent
from yolov12.mas.journal.highlights import size
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
    hits,
    label_steps,
    limits,
    mark,
    running_median,
    steps_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from yolov12.mas.journal.labels import Label

__all__ = ["draw_memory", "draw_micro_batches", "draw_room", "draw_speed"]

_Row = Mapping[str, str]


def draw_memory(axes: Axes, rows: Sequence[_Row], labels: Sequence[Label], *, budget: bool) -> None:
    """Draw the peaks in GiB, with the budget above them, and say what happened.

    Args:
        axes: Panel to draw in.
        rows: Rows of the steps to draw.
        labels: What to say.
        budget: Draw the budget. Where it is far above the peaks, they would be a flat line under an empty field.
    """
    steps = steps_of(rows)
    peak, predicted, reserved, budgets = (
        [float(row[f"{name}_mib"]) / 1024 for row in rows] for name in ("peak", "predicted", "reserved", "budget")
    )
    marker = dot(rows)
    axes.fill_between(steps, reserved, color=SKY, alpha=0.22, linewidth=0, label="reserved, with cache")
    if budget:
        axes.plot(steps, budgets, color=BLACK, linewidth=2, marker=marker, ms=4, label="budget")
    axes.plot(steps, peak, color=BLUE, linewidth=1.3, marker=marker, ms=4, label="measured peak")
    axes.plot(steps, predicted, ":", color=ORANGE, linewidth=1.6, marker=marker, ms=3, label="predicted peak")
    if resumed := [steps[index] - 0.5 for index in hits(rows, "resumed")]:
        axes.vlines(resumed, 0, 1, GREEN, "-.", label="resumed", transform=axes.get_xaxis_transform())
    mark(axes, rows, "out-of-memory", peak, marker="X", color=VERMILION, label="out-of-memory, survived")
    label_steps(axes, labels)
    limits(axes, max(*peak, *predicted, *reserved, *(budgets if budget else ()), 0.001), labels)
    caption(axes, "Memory of this process" if budget else "Peak of each step, far below the budget", "GiB")


def draw_room(axes: Axes, tightest: Mapping[int, _Row]) -> None:
    """Draw a bar for each rank: its highest peak as a part of its budget.

    Args:
        axes: Panel to draw in.
        tightest: Rank → row with its highest peak over budget.
    """
    for place, (rank, row) in enumerate(tightest.items()):
        percent = 100 * fraction(row)
        peak, budget = (size(float(row[f"{name}_mib"])) for name in ("peak", "budget"))
        axes.barh(place, 100, color="white", edgecolor=BLACK, linewidth=1.6)
        axes.barh(place, percent, color=BLUE)
        axes.text(
            percent + 0.8, place, f"peak {peak} = {in_percent(percent)}", va="center", fontsize=10, fontweight="bold"
        )
        whose = f" of rank {rank}" if len(tightest) > 1 else ""
        axes.text(99.2, place, f"budget{whose}: {budget}", va="center", ha="right", fontsize=10)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 25), [f"{percent} %" for percent in range(0, 101, 25)])
    axes.set_yticks([])
    axes.invert_yaxis()
    caption(axes, "Highest peak over budget", "")


def draw_micro_batches(axes: Axes, rows: Sequence[_Row]) -> None:
    """Draw the size of the micro-batches and their number."""
    steps = steps_of(rows)
    sizes = [[int(size) for size in row["micro_batches"].split()] for row in rows]
    largest, counts = [max(size) for size in sizes], [len(size) for size in sizes]
    for values, color, width, line, label in (
        (counts, PURPLE, 1.3, "--", "micro-batches per step"),
        (largest, BLUE, 1.8, "-", "images in the largest micro-batch"),
    ):
        style: dict[str, Any] = {"color": color, "linewidth": width, "linestyle": line, "label": label}
        axes.step(steps, values, where="mid", marker=dot(rows), ms=4, **style)
    mark(axes, rows, "shrunk", largest, marker="v", color=VERMILION, label="shrunk")
    mark(axes, rows, "grew", largest, marker="^", color=GREEN, label="grew")
    # Both lines share one scale of powers of two, so that halving one and doubling the other look alike.
    axes.set_yscale("log", base=2)
    top = max(*largest, *counts)
    powers = [2**power for power in range(math.ceil(math.log2(top)) + 1)]
    axes.set_yticks(powers, [str(power) for power in powers])
    axes.set_ylim(0.75, top * 1.6)
    caption(axes, "How each batch was split", "number")


def draw_speed(axes: Axes, rows: Sequence[_Row]) -> None:
    """Draw images/s, with a running median in a long run."""
    timed = [row for row in rows if row["images_per_s"]]
    steps, speeds = steps_of(timed), [float(row["images_per_s"]) for row in timed]
    if len(timed) > DOTTED_STEPS:
        axes.plot(steps, speeds, color=BLUE, alpha=0.3, linewidth=0.8, label="each step")
        axes.plot(steps, running_median(speeds), color=BLUE, linewidth=1.8, label="running median")
    else:
        axes.plot(steps, speeds, color=BLUE, linewidth=1.4, marker=dot(rows), ms=4, label="each step")
    axes.set_ylim(0, max(speeds, default=1) * 1.1)
    caption(axes, "Speed", "images/s")
