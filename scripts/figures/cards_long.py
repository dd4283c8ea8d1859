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
    """Yield why the peaks of the second half deviate: the controller tried another size once."""
    half = rows[len(rows) // 2 :]
    small = [index for index, row in enumerate(half) if set(sizes(row)) == {32}]
    large = [row for index, row in enumerate(half) if index not in small]
    assert small == list(range(small[0], small[0] + len(small)))
    assert not any(half[index]["plan"] for index in small)
    assert all(set(sizes(row)) == {64} and row["plan"] for row in large)
    yield sentence("{:.2f} of what Ultralytics' do (target a tenth: missed)", over)
    yield sentence(
        "From step {} of this half on, the controller tried micro-batches of 32 without a checkpoint plan for {} steps",
        *(small[0] + 1, len(small)),
    )
    peaks = [[float(row["peak_mib"]) for row in part] for part in ([half[index] for index in small], large)]
    yield sentence("with peaks of {:,.0f} MiB in place of {:,.0f}", *map(statistics.mean, peaks))
    yield sentence("Without these steps, they deviate by {:.0f} MiB", statistics.stdev(peaks[1]))
    found = result("cards_100")
    (first, alone), stock = found["earlier"], found["t4"]["rows"]["stock"]
    own = alone["ours"]
    yield sentence(
        "Alone on another host, at commit {}, this package had {:.0f} images/s, and its peaks deviated by {:.0f} MiB",
        *(own["commit"], own["images_per_s_all"], own["peak_sd_mib"]),
    )
    yield sentence("which is {:.3f} of Ultralytics' here", own["peak_sd_mib"] / stock["peak_sd_mib"])
    pair = [first[who] for who in ("ours", "stock")]
    (commit,) = {run["commit"] for run in pair}
    speeds = [run["images_per_s_all"] for run in pair]
    yield sentence(
        "Beside Ultralytics, at commit {}, it had {:.0f} images/s and Ultralytics {:.0f}, a ratio of {:.2f}",
        *(commit, *speeds, speeds[0] / speeds[1]),
    )
    yield sentence("deviated by {:.2f} of Ultralytics'", pair[0]["peak_sd_mib"] / pair[1]["peak_sd_mib"])
