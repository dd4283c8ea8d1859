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
    assert over["peak_sd_mib_over_stock"] <= 0.1
    yield sentence(
        "is {:.2f} times as fast (target 3: met), and {:.2f} times with the setup of {:.1f} and {:.1f} s",
        *(over["images_per_s_all_over_stock"], with_setup(ours, stock), ours["setup_s"], stock["setup_s"]),
    )
    yield sentence(
        "The first epoch takes {:.1f} and {:.1f} s (aim of 3 s more: missed), and the later ones {:.1f} and {:.1f} s",
        *(ours["epoch_s"][0], stock["epoch_s"][0]),
        *(statistics.median(run["epoch_s"][1:]) for run in (ours, stock)),
    )
    yield sentence("deviate by {:.3f} of what Ultralytics' do (target a tenth: met)", over["peak_sd_mib_over_stock"])
    yield sentence("and those of all steps by {:.2f} times", over["peak_sd_all_mib_over_stock"])
    yield from _tried(journal(ours))
    yield from _earlier(found["earlier"])
    summary = ours["summary"]
    assert summary["updates"] == summary["updates_expected"]
    assert (summary["images_lost"], events(ours), ours["allocator_failures"]) == (0, (0, 0), 0)
    replayed = sum(int(row["replayed"]) == len(sizes(row)) for row in journal(ours))
    yield sentence("all {} updates were made, {} of them with", summary["updates"], replayed)


def _tried(rows: list[dict[str, Any]]) -> Iterator[Passage]:
    """Yield when the controller tried other sizes than the usual one, all of them in the first half."""
    small, large = ([int(row["step"]) for row in rows if set(sizes(row)) == {size}] for size in (32, 128))
    assert max(small + large) <= len(rows) // 2
    assert all(set(sizes(row)) == {64} for row in rows[max(large) :])
    for steps in (small, large):
        assert steps == list(range(steps[0], steps[-1] + 1))
    yield sentence(
        "micro-batches of 32 in steps {} and {}, and of 128 in steps {} to {}",
        *(small[0], small[-1], large[0], large[-1]),
    )
    assert len(small) == 2


def _earlier(found: list[dict[str, Any]]) -> Iterator[Passage]:
    """Yield the passages on trainings at earlier commits."""
    misled, alone, retried = found
    assert set(alone) == {"ours"}
    first = "the first, at commit {}, was {:.2f} times as fast as Ultralytics beside it"
    last = "The last one before that of the table, at commit {}, was {:.2f} times as fast"
    for runs, words in ((misled, first), (retried, last)):
        ours, stock = runs["ours"], runs["stock"]
        assert ours["commit"] == stock["commit"]
        ratios = [ours[key] / stock[key] for key in ("images_per_s_all", "peak_sd_mib")]
        yield sentence(words + ", and its peaks deviated by {:.2f}", ours["commit"], *ratios)
    own = alone["ours"]
    yield sentence(
        "Another one, at commit {} and alone on its host, had {:.0f} images/s, and its peaks deviated by {:.0f} MiB",
        *(own["commit"], own["images_per_s_all"], own["peak_sd_mib"]),
    )
