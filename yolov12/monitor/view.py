"""What `yolov12 monitor` shows of a run, as text of a given size. All functions are pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.text import Text

from yolov12.mas.journal.conclusion import Facts, facts_of, fraction, in_percent
from yolov12.mas.journal.highlights import as_split, highlights_of_ranks, size
from yolov12.monitor.chart import bar, columns, rows_of_bars
from yolov12.monitor.runs import State
from yolov12.printable import printable

__all__ = ["render"]

_Row = Mapping[str, str]

_LABEL = 9  # characters left of a chart
_SPLIT_ROWS, _EVENTS, _RANKS = 3, 4, 8
_TIGHT = 0.9
_STYLES = {"─": "bold", "-": "bold", "░": "dim", ".": "dim"}


def render(
    name: str, journals: Mapping[int, Sequence[_Row]], state: State, width: int, height: int, *, unicode: bool
) -> Text:
    """Return the picture of a run.

    Args:
        name: Name of the run.
        journals: Rank → rows, without ranks that have none.
        state: How the run stands.
        width: Characters in a line.
        height: Lines. The chart of the peaks gets those that nothing else needs.
        unicode: The terminal can show block characters.
    """
    name = printable(name)
    if not journals:
        return _shown(Text(f"{name} · {state.text}"), unicode=unicode)
    facts = facts_of(journals)
    last = [rows[-1] for rows in journals.values()]
    newest = max(last, key=lambda row: int(row["step"]))
    lines = [
        Text(f"{name} · {state.text} · epoch {int(newest['epoch'])}, step {int(newest['step']):,}", "bold"),
        Text(facts.headline() if state.ended else f"so far: {facts.headline()}"),
        Text(_figures(facts), "dim"),
        *_gauges(journals, width, unicode=unicode),
    ]
    tightest = max(journals.values(), key=lambda rows: max(map(fraction, rows)))
    found = highlights_of_ranks(journals)[-_EVENTS:]
    below = [Text(f"{each.step:>{_LABEL - 2},}  {each.text}") for each in found]
    room = height - len(lines) - len(below) - _SPLIT_ROWS - 5
    rank = next(rank for rank, rows in journals.items() if rows is tightest)
    whose = f", rank {rank}" if len(journals) > 1 else ""
    if room >= 2:
        lines += _peaks(tightest, width, room, whose, roomy=facts.roomy, unicode=unicode)
        lines += _splits(tightest, width, whose, unicode=unicode)
    if below:
        lines += [Text("what happened", "bold"), *below]
    text = Text("\n").join(_cut(line, width, unicode) for line in lines[:height])
    return _shown(text, unicode=unicode)


def _shown(text: Text, *, unicode: bool) -> Text:
    """Return the text as the terminal can show it."""
    if unicode:
        return text
    return Text(text.plain.replace("×", "x").replace("·", "|").encode("ascii", "replace").decode())


def _figures(facts: Facts) -> str:
    speed = f" · {facts.images_per_s:,.0f} images/s" if facts.images_per_s else ""
    ran = f"{facts.ranks} ranks" if facts.ranks > 1 else f"mostly {facts.split}"
    return f"batch of {facts.batch:,}, {ran} · peak at most {in_percent(facts.percent)} of the budget{speed}"


def _gauges(journals: Mapping[int, Sequence[_Row]], width: int, *, unicode: bool) -> list[Text]:
    """Return a line for each rank: how much of its budget the last step took, and how its batch ran."""
    lines = []
    for rank, rows in list(journals.items())[:_RANKS]:
        row = rows[-1]
        peak, budget = (size(float(row[f"{name}_mib"])) for name in ("peak", "budget"))
        whose = f"rank {rank}: " if len(journals) > 1 else "now: "
        speed = f", {float(row['images_per_s']):,.0f} images/s" if row["images_per_s"] else ""
        before, after = f"{whose}{peak} of {budget} ", f" {in_percent(100 * fraction(row))} "
        after += f"as {as_split(row['micro_batches'])}{speed}" if row["micro_batches"] else "no images"
        line = Text(before)
        style = "red" if fraction(row) > 1 else "yellow" if fraction(row) > _TIGHT else "blue"
        line.append(bar(fraction(row), max(width - len(before) - len(after), 4), unicode=unicode), style)
        lines.append(line.append(after))
    if len(journals) > _RANKS:
        lines.append(Text(f"and {len(journals) - _RANKS} more ranks", "dim"))
    return lines


def _peaks(rows: Sequence[_Row], width: int, height: int, whose: str, *, roomy: bool, unicode: bool) -> list[Text]:
    places = columns([int(row["step"]) for row in rows], max(width - _LABEL, 1))
    peaks = [max(float(rows[index]["peak_mib"]) for index in place) for place in places]
    budgets = [min(float(rows[index]["budget_mib"]) for index in place) for place in places]
    top = max(*peaks, *(() if roomy else budgets), 1.0)
    failed = [any("out-of-memory" in rows[index]["events"] for index in place) for place in places]
    line = () if roomy else budgets
    what = "peak of each step, far below the budget" if roomy else "peak of each step, and budget (line)"
    marks = [Text("".join("X" if each else " " for each in failed), "bold red")] if any(failed) else []
    bars = rows_of_bars(peaks, top, height - len(marks), line, unicode=unicode)
    labels = [size(top), *[""] * (len(bars) - 2), "0"] if len(bars) > 1 else [size(top)]
    return [
        Text(f"{what}{whose}" + (", X: out of memory, survived" if marks else ""), "bold"),
        *(Text(" " * _LABEL).append_text(mark) for mark in marks),
        *(_labelled(label, bars_row) for label, bars_row in zip(labels, bars, strict=True)),
        _axis(rows, len(places)),
    ]


def _splits(rows: Sequence[_Row], width: int, whose: str, *, unicode: bool) -> list[Text]:
    batch = max(int(row["images"]) for row in rows) or 1
    rows = [row for row in rows if int(row["images"]) == batch] or rows  # without the last batches of epochs
    places = columns([int(row["step"]) for row in rows], max(width - _LABEL, 1))
    sizes = [max(map(int, row["micro_batches"].split()), default=0) for row in rows]
    smallest = [float(min(sizes[index] for index in place)) for place in places]
    bars = rows_of_bars(smallest, batch, _SPLIT_ROWS, unicode=unicode)
    return [
        Text(f"images in a micro-batch{whose}", "bold"),
        *(_labelled(label, line) for label, line in zip([str(batch), "", "0"], bars, strict=True)),
    ]


def _labelled(label: str, bars: str) -> Text:
    line = Text().append(f"{label:>{_LABEL - 1}} ", "dim")
    for style, cells in groupby(bars, lambda cell: _STYLES.get(cell, "blue")):  # few spans are few bytes over SSH
        line.append("".join(cells), style)
    return line


def _axis(rows: Sequence[_Row], width: int) -> Text:
    first, last = f"{int(rows[0]['step']):,}", f"{int(rows[-1]['step']):,}"
    between = max(width - len(first) - len(last), 1)
    return Text(f"{'step':>{_LABEL - 1}} {first}{' ' * between}{last}", "dim")


def _cut(line: Text, width: int, unicode: bool) -> Text:
    """Shorten a line that is wider than the terminal."""
    line.truncate(width, overflow="ellipsis" if unicode else "crop")
    return line
