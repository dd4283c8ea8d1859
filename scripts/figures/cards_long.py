"""Figures of benchmarks/cards.py with as many epochs as Ultralytics trains by default."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from scripts.figures.cards import CARDS, MEASURED, RATIOS, events, measured_rows, ratio_rows, with_setup
from scripts.figures.measured_steps import HOW, measured, sizes
from scripts.figures.measured_trainings import journal
from scripts.figures.pages import Passage, result, sentence, setting, table


def long_runs() -> list[dict[str, Any]]:
    """Return this package's training and Ultralytics'."""
    rows = result("cards_100")["t4"]["rows"]
    return [rows[who] for who in ("ours", "stock")]


@measured("The same in 100 epochs")
def long_trainings() -> Iterator[Passage]:
    """Yield the passages of the section."""
    found = result("cards_100")
    card, (ours, stock) = found["t4"], long_runs()
    (commit,) = {run["commit"] for run in (ours, stock)}
    yield sentence("at commit {}, at the same time on two GPUs", commit)
    yield setting("NVIDIA H200, each with 16 cores", HOW)
    yield sentence("Ultralytics' default, here {:,} images", card["epochs"] * card["images_an_epoch"])
    cards = {CARDS["t4"]: card}
    yield table(MEASURED, measured_rows(cards))
    yield table(RATIOS, ratio_rows(cards))
    over = card["summary"]
    assert over["images_per_s_all_over_stock"] > 3
    assert over["peak_sd_mib_over_stock"] > 0.1
    yield sentence(
        "is {:.2f} times as fast (target 3: met), and {:.2f} times with the setup of {:.1f} and {:.1f} s",
        *(over["images_per_s_all_over_stock"], with_setup(ours, stock), ours["setup_s"], stock["setup_s"]),
    )
    yield sentence(
        "The first epoch takes {:.1f} and {:.1f} s, and the later ones {:.1f} and {:.1f} s (medians)",
        *(ours["epoch_s"][0], stock["epoch_s"][0]),
        *(statistics.median(run["epoch_s"][1:]) for run in (ours, stock)),
    )
    yield sentence("and those of all steps by {:.2f} times", over["peak_sd_all_mib_over_stock"])
    yield from _peaks(over["peak_sd_mib_over_stock"], journal(ours))
    summary = ours["summary"]
    assert summary["updates"] == summary["updates_expected"]
    assert (summary["images_lost"], events(ours), ours["allocator_failures"]) == (0, (0, 0), 0)
    replayed = sum(int(row["replayed"]) == len(sizes(row)) for row in journal(ours))
    yield sentence("all {} updates were made, {} of them with", summary["updates"], replayed)


def _peaks(over: float, rows: list[dict[str, Any]]) -> Iterator[Passage]:
    """Yield why the peaks of the second half deviate: the controller changed the size once."""
    half = rows[len(rows) // 2 :]
    large = [row for row in half if set(sizes(row)) == {64}]
    small = half[len(large) :]
    assert half[: len(large)] == large
    assert all(set(sizes(row)) == {32} and not row["plan"] for row in small)
    yield sentence("{:.2f} of what Ultralytics' do (target a tenth: missed)", over)
    yield sentence(
        "In step {} of this half, the controller went from micro-batches of 64 with a checkpoint plan to 32 without",
        len(large) + 1,
    )
    peaks = [[float(row["peak_mib"]) for row in part] for part in (large, small)]
    yield sentence("from peaks of {:,.0f} MiB to {:,.0f} MiB", *map(statistics.mean, peaks))
    yield sentence("Before and after it, they deviate by {:.0f} and {:.0f} MiB", *map(statistics.stdev, peaks))
    slow = float(half[0]["step_ms"])
    usual = [
        statistics.median(float(row["step_ms"]) for row in rows if sizes(row) == sizes(way[0]))
        for way in (large, small)
    ]
    assert slow > 3 * usual[0]
    yield sentence(
        "a single step had taken {:.0f} ms in place of {:.0f}. Micro-batches of 32 take {:.0f} ms", slow, *usual
    )
    yield sentence("ran in the {} steps that were left", len(small))
