"""memory.png: a picture of what the engine did, step by step.

With several ranks, the picture shows each rank in its own colour: its peak and budget, its share of each batch, and its
speed.

The colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart
(https://jfly.uni-koeln.de/color/). Markers also differ in shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "save", "thin"]

_Row = Mapping[str, str]

_BLACK, _BLUE, _ORANGE, _SKY = "#000000", "#0072B2", "#E69F00", "#56B4E9"
_VERMILION, _GREEN, _PURPLE = "#D55E00", "#009E73", "#CC79A7"
# Parts into which a long run is divided, with up to three steps drawn for each. With more lines than pixels, the
# picture would be a solid band.
_BINS = 600
# Most epochs that are marked with a vertical line. More lines would hide everything else.
_EPOCHS = 60
_RANK_COLORS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _VERMILION, _BLACK, "#8C8C8C")  # more ranks use a colour scale
_NONE: Mapping[int, Sequence[_Row]] = {}
# Most steps for which each gets a dot. A line through a single step would be invisible.
_DOTTED_STEPS = 40


def save(rows: Sequence[_Row], path: Path, others: Mapping[int, Sequence[_Row]] = _NONE) -> None:
    """Write the picture as a PNG of 1200 x 800 pixels.

    Args:
        rows: At least one row, as `read_rows` returns them.
        path: File to write.
        others: Rank → rows, for the ranks above 0.
    """
    draw(rows, others).savefig(path)


def draw(rows: Sequence[_Row], others: Mapping[int, Sequence[_Row]] = _NONE) -> Figure:
    """Draw memory in GiB, micro-batches and images/s in three panels over the steps.

    With several ranks, the second panel shows each rank's share of the batch.

    Args:
        rows: At least one row, as `read_rows` returns them.
        others: Rank → rows, for the ranks above 0.
    """
    # Imported here, because the engine does not need matplotlib. Not pyplot, which keeps every figure alive and selects
    # a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(5, 3, 3))
    if others:
        journals = {0: rows, **others}
        rows = max(journals.values(), key=len)
        _draw_ranks(panels, journals)
    else:
        shown = thin(rows)
        _memory(panels[0], shown)
        _micro_batches(panels[1], shown)
        _speed(panels[2], shown)
    epochs = _new_epochs(rows)
    for axes in panels:
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for step in epochs if len(epochs) < _EPOCHS else ():
            axes.axvline(step - 0.5, color="0.85", linewidth=0.8, zorder=0)
    panels[2].set_xlim(int(rows[0]["step"]) - 0.5, int(rows[-1]["step"]) + 0.5)
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[2].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    lines = " (vertical lines: a new epoch)" if 0 < len(epochs) < _EPOCHS else ""
    panels[2].set_xlabel(f"optimizer step{lines}")
    return figure


def thin(rows: Sequence[_Row], bins: int = _BINS) -> list[_Row]:
    """Choose the rows of a long run to draw.

    The run is divided into `bins` equal parts. From each part, the steps with the highest peak, the lowest budget and
    the median speed are drawn, and all steps with an event. Whole rows are chosen, so everything drawn at a step
    happened at that step.

    Args:
        rows: Rows, as `read_rows` returns them.
        bins: Number of parts. A run with at most as many rows is drawn completely.
    """
    if len(rows) <= bins:
        return list(rows)
    width = math.ceil(len(rows) / bins)
    chosen: set[int] = {index for index, row in enumerate(rows) if row["events"]}
    for start in range(0, len(rows), width):
        stretch = range(start, min(start + width, len(rows)))
        chosen.add(max(stretch, key=lambda index: float(rows[index]["peak_mib"])))
        chosen.add(min(stretch, key=lambda index: float(rows[index]["budget_mib"])))
        timed = [index for index in stretch if rows[index]["images_per_s"]]
        if timed:
            chosen.add(sorted(timed, key=lambda index: float(rows[index]["images_per_s"]))[len(timed) // 2])
    return [rows[index] for index in sorted(chosen)]


def _memory(axes: Axes, rows: Sequence[_Row]) -> None:
    steps = _steps(rows)
    peak, predicted, reserved, budget = (
        [float(row[f"{name}_mib"]) / 1024 for row in rows] for name in ("peak", "predicted", "reserved", "budget")
    )
    dot = _dot(rows)
    axes.fill_between(steps, reserved, color=_SKY, alpha=0.22, linewidth=0, label="reserved, with cache")
    axes.plot(steps, budget, color=_BLACK, linewidth=1.6, marker=dot, ms=4, label="budget")
    axes.plot(steps, peak, color=_BLUE, linewidth=1.4, marker=dot, ms=4, label="measured peak")
    axes.plot(steps, predicted, "--", color=_ORANGE, linewidth=1.1, marker=dot, ms=4, label="predicted peak")
    if resumed := [int(row["step"]) - 0.5 for row in rows if _has_event(row, "resumed")]:
        axes.vlines(resumed, 0, 1, _GREEN, ":", label="resumed", transform=axes.get_xaxis_transform())
    _mark(axes, rows, "out-of-memory", peak, "X", _VERMILION, "out-of-memory, survived")
    axes.set_ylim(0, max(*peak, *predicted, *reserved, *budget, 0.001) * 1.06)
    _caption(axes, "Memory of this process", "GiB")


def _micro_batches(axes: Axes, rows: Sequence[_Row]) -> None:
    steps = _steps(rows)
    sizes = [[int(size) for size in row["micro_batches"].split()] for row in rows]
    largest, counts = [max(size) for size in sizes], [len(size) for size in sizes]
    dot = _dot(rows)
    for values, color, width, label in (
        (counts, _PURPLE, 1.1, "micro-batches per step"),
        (largest, _BLUE, 1.8, "images in the largest micro-batch"),
    ):
        axes.step(steps, values, where="mid", color=color, linewidth=width, marker=dot, ms=4, label=label)
    _mark(axes, rows, "shrunk", largest, "v", _VERMILION, "shrunk")
    _mark(axes, rows, "grew", largest, "^", _GREEN, "grew")
    # Both lines share one scale of powers of two, so that halving one and doubling the other look alike.
    axes.set_yscale("log", base=2)
    top = max(*largest, *counts)
    powers = [2**power for power in range(math.ceil(math.log2(top)) + 1)]
    axes.set_yticks(powers, [str(power) for power in powers])
    axes.set_ylim(0.75, top * 1.6)
    _caption(axes, "How each batch was split", "number")


def _speed(axes: Axes, rows: Sequence[_Row]) -> None:
    timed = [row for row in rows if row["images_per_s"]]
    steps, speeds = _steps(timed), [float(row["images_per_s"]) for row in timed]
    if len(timed) > _DOTTED_STEPS:
        axes.plot(steps, speeds, color=_BLUE, alpha=0.3, linewidth=0.8, label="each step")
        axes.plot(steps, _running_median(speeds), color=_BLUE, linewidth=1.8, label="running median")
    else:
        axes.plot(steps, speeds, color=_BLUE, linewidth=1.4, marker=_dot(rows), ms=4, label="each step")
    axes.set_ylim(0, max(speeds, default=1) * 1.1)
    _caption(axes, "Speed", "images/s")


def _draw_ranks(panels: Sequence[Axes], journals: Mapping[int, Sequence[_Row]]) -> None:
    shown, colors = _thin_all(journals), _rank_colors(journals)
    _memory_of_ranks(panels[0], shown, colors)
    _shares(panels[1], shown, colors, every_step=shown == journals)
    _speed_of_ranks(panels[2], shown, colors)


def _thin_all(journals: Mapping[int, Sequence[_Row]]) -> dict[int, Sequence[_Row]]:
    """Choose the same steps for all ranks."""
    if max(map(len, journals.values())) <= _BINS:
        return dict(journals)
    bins = max(_BINS // len(journals), _BINS // 10)
    steps = {step for rows in journals.values() for step in _steps(thin(rows, bins))}
    return {rank: [row for row in rows if int(row["step"]) in steps] for rank, rows in journals.items()}


def _rank_colors(ranks: Iterable[int]) -> dict[int, Any]:
    from matplotlib import colormaps

    ranks = list(ranks)
    if len(ranks) <= len(_RANK_COLORS):
        return dict(zip(ranks, _RANK_COLORS, strict=False))
    return {rank: colormaps["viridis"](0.92 * index / (len(ranks) - 1)) for index, rank in enumerate(ranks)}


def _memory_of_ranks(axes: Axes, journals: Mapping[int, Sequence[_Row]], colors: Mapping[int, Any]) -> None:
    few = len(journals) <= len(_RANK_COLORS)
    top = 0.001
    for rank, rows in journals.items():
        worked = [row for row in rows if int(row["images"])]
        peaks = [float(row["peak_mib"]) / 1024 for row in worked]
        budgets = [float(row["budget_mib"]) / 1024 for row in rows]
        style = {"color": colors[rank], "alpha": 1 if few else 0.8}
        axes.plot(_steps(rows), budgets, "--", linewidth=0.8, **style)
        axes.plot(_steps(worked), peaks, linewidth=1.5 if few else 1.0, marker=_dot(rows), ms=4, **style)
        _mark_rank(axes, worked, "out-of-memory", peaks, "X", colors[rank])
        top = max(top, *budgets, *peaks, 0)
    axes.set_ylim(0, top * 1.06)
    resumed = sorted(
        {int(row["step"]) - 0.5 for rows in journals.values() for row in rows if _has_event(row, "resumed")}
    )
    if resumed:
        axes.vlines(resumed, 0, 1, "0.3", ":", transform=axes.get_xaxis_transform())
    _legend_entry(axes, "measured peak", linewidth=1.5)
    _legend_entry(axes, "budget", linestyle="--", linewidth=0.8)
    if resumed:
        _legend_entry(axes, "resumed", linestyle=":")
    _event_legend_entry(axes, journals, "out-of-memory", "X", "out-of-memory, survived")
    _rank_legend(axes, colors)
    _caption(axes, "Memory of each rank", "GiB")


def _rank_legend(axes: Axes, colors: Mapping[int, Any]) -> None:
    """Draw a legend of the ranks above the place of the other legend. With many ranks it names only some of them."""
    from matplotlib.lines import Line2D

    every = math.ceil(len(colors) / len(_RANK_COLORS))
    ranks = [rank for index, rank in enumerate(colors) if index % every == 0 or index == len(colors) - 1]
    legend = axes.legend(
        handles=[Line2D([], [], label=f"rank {rank}", color=colors[rank], linewidth=4) for rank in ranks],
        loc="lower right",
        bbox_to_anchor=(1, 1.06),
        ncols=len(ranks),
        frameon=False,
        fontsize=9,
    )
    axes.add_artist(legend)  # otherwise the next legend would replace it
    legend.set_clip_on(False)  # otherwise the layout would leave no room for it


def _shares(axes: Axes, journals: Mapping[int, Sequence[_Row]], colors: Mapping[int, Any], *, every_step: bool) -> None:
    """Draw the shares as stacked bands, which add up to the batch. Lines of equal shares would hide each other."""
    images = {rank: {int(row["step"]): int(row["images"]) for row in rows} for rank, rows in journals.items()}
    below = dict.fromkeys(sorted(step for of_rank in images.values() for step in of_rank), 0)
    steps = list(below)
    # It is chance which of the smaller last batches of epochs are among the steps drawn, so they are left out.
    if not every_step:
        whole = [sum(of_rank.get(step, 0) for of_rank in images.values()) for step in steps]
        dips = [index for index in range(1, len(steps) - 1) if whole[index] < min(whole[index - 1], whole[index + 1])]
        steps = [step for index, step in enumerate(steps) if index not in set(dips)]
    width = 1.4 if len(journals) <= len(_RANK_COLORS) else 0.5
    for rank, rows in journals.items():
        above = {step: count + images[rank].get(step, 0) for step, count in below.items()}
        low, high = [below[step] for step in steps], [above[step] for step in steps]
        axes.fill_between(steps, low, high, step="mid", color=colors[rank], alpha=0.35, linewidth=0)
        axes.step(steps, high, where="mid", color=colors[rank], linewidth=width, marker=_dot(steps), ms=4)
        middles = [(above[step] + below[step]) / 2 for step in _steps(rows)]
        _mark_rank(axes, rows, "shrunk", middles, "v", colors[rank])
        _mark_rank(axes, rows, "grew", middles, "^", colors[rank])
        below = above
    axes.set_ylim(0, max(*below.values(), 1) * 1.08)
    _event_legend_entry(axes, journals, "shrunk", "v", "micro-batch shrunk")
    _event_legend_entry(axes, journals, "grew", "^", "micro-batch grew")
    _caption(axes, "Share of each rank in the batch", "images")


def _speed_of_ranks(axes: Axes, journals: Mapping[int, Sequence[_Row]], colors: Mapping[int, Any]) -> None:
    top = 1.0
    for rank, rows in journals.items():
        timed = [row for row in rows if row["images_per_s"] and int(row["images"])]
        speeds = [float(row["images_per_s"]) for row in timed]
        if len(timed) > _DOTTED_STEPS:
            speeds = _running_median(speeds)
        axes.plot(_steps(timed), speeds, color=colors[rank], linewidth=1.4, marker=_dot(rows), ms=4)
        top = max(top, *speeds, 0)
    axes.set_ylim(0, top * 1.1)
    smooth = any(len(rows) > _DOTTED_STEPS for rows in journals.values())
    _caption(axes, "Speed of each rank's own work" + (", running median" if smooth else ""), "images/s")


def _running_median(values: Sequence[float]) -> list[float]:
    reach = max(2, len(values) // 100)
    return [median(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def _legend_entry(axes: Axes, label: str, **style: Any) -> None:
    """Add a legend entry in grey for something that is drawn in the colours of the ranks."""
    axes.plot([], [], label=label, **{"color": "0.3", **style})


def _event_legend_entry(
    axes: Axes, journals: Mapping[int, Sequence[_Row]], prefix: str, marker: str, label: str
) -> None:
    if any(_has_event(row, prefix) for rows in journals.values() for row in rows):
        _legend_entry(axes, label, linestyle="", marker=marker, ms=9, markerfacecolor="white", markeredgecolor=_BLACK)


def _mark_rank(
    axes: Axes, rows: Sequence[_Row], prefix: str, heights: Sequence[float], marker: str, color: Any
) -> None:
    """Mark events. The shape shows the kind of event, and the colour shows the rank."""
    hits = [index for index, row in enumerate(rows) if _has_event(row, prefix)]
    if hits:
        places = [int(rows[index]["step"]) for index in hits], [heights[index] for index in hits]
        axes.scatter(*places, s=85, marker=marker, color=color, edgecolor=_BLACK, linewidth=0.9, zorder=5)


def _mark(
    axes: Axes, rows: Sequence[_Row], prefix: str, heights: Sequence[float], marker: str, color: str, label: str
) -> None:
    hits = [index for index, row in enumerate(rows) if _has_event(row, prefix)]
    if hits:
        places = [int(rows[index]["step"]) for index in hits], [heights[index] for index in hits]
        axes.scatter(*places, s=85, marker=marker, color=color, edgecolor="white", linewidth=0.7, zorder=5, label=label)


def _caption(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_ylabel(unit)
    if axes.get_legend_handles_labels()[1]:
        # The legend is above the panel, beside its title, where it hides nothing.
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6, frameon=False, fontsize=9, columnspacing=1.5)


def _has_event(row: _Row, prefix: str) -> bool:
    return any(event.startswith(prefix) for event in row["events"].split("; "))


def _steps(rows: Sequence[_Row]) -> list[int]:
    return [int(row["step"]) for row in rows]


def _dot(rows: Sequence[object]) -> str:
    return "o" if len(rows) <= _DOTTED_STEPS else ""


def _new_epochs(rows: Sequence[_Row]) -> list[int]:
    return [int(row["step"]) for last, row in pairwise(rows) if row["epoch"] != last["epoch"]]
