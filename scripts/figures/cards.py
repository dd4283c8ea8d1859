"""Figures of benchmarks/cards.py: trainings in the memory of smaller cards. They are on no page before the file exists.

`passages` has the section of docs/reference/measurements.md, and `readme_rows` the rows of both READMEs, in which they
take the place of those of dense.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.dense_search import held_of
from scripts.figures.measured_steps import HOW, list_of, measured, sizes
from scripts.figures.measured_trainings import journal
from scripts.figures.pages import RESULTS, Passage, result, say, sentence, setting, table

HEADING = "Label-dense data in the memory of smaller cards"
CARDS = {"t4": "T4", "a10": "A10", "a100": "A100 40 GB"}
ROWS = {
    "ours": "this package",
    "stock": "Ultralytics, largest stable batch",
    "autobatch": "Ultralytics, AutoBatch",
    "halving": "Ultralytics, halves the batch",
    "all": "all layers recomputed, largest stable batch",
}
MEASURED = "| imitated card | training | batch | images/s | without the first epoch "
MEASURED += "| peak of a step, MiB: mean ± standard deviation | of all steps | out-of-memory events | interruptions |"
RATIOS = "| imitated card | images/s | without the first epoch | standard deviation of the peak | of all steps |"
SEARCH = "| imitated card | Ultralytics: held | failed | all layers recomputed: held | failed |"
README = {
    "whole trainings on label-dense data in the memory of a T4, an A10 and an A100 40 GB: YOLO12-S, images/s": (
        "标注密集数据上的完整训练，显存相当于 T4、A10 和 A100 40 GB：YOLO12-S，图像/秒"
    ),
    "the same trainings: standard deviation of the memory peak of a step, MiB": "同一训练：每步显存峰值的标准差，MiB",
}
"""First cell of each row of `readme_rows` in both languages."""
EXISTS = (RESULTS / "cards.json").exists()


def cards_of(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the content of each imitated card that was measured."""
    for name, label in CARDS.items():
        if found.get(name, {}).get("rows"):
            yield label, found[name]


def events(run: Mapping[str, Any]) -> tuple[int, int]:
    """Return how often memory was short in a training, and how often it lost an epoch or ended.

    Ultralytics says only once that it assigns image by image, however often it does.
    """
    interruptions = run.get("halvings", 0) + bool(run["failure"])
    if "summary" in run:
        return run["summary"]["out_of_memories"], interruptions
    return interruptions + run.get("assigner_fallbacks", 0), interruptions


def batch_of(run: Mapping[str, Any]) -> str:
    """Return the batch of a training, and what became of it."""
    if rows := journal(dict(run)):
        at_once = [max(sizes(row)) for row in rows]
        return f"{run['batch']} ({min(at_once)} to {max(at_once)} at once)"
    batches = [run.get("started_at"), run.get("ran_at")]
    return " → ".join(dict.fromkeys(str(batch) for batch in batches if batch))


def passages(found: Mapping[str, Any]) -> Iterator[Passage]:
    """Yield the passages of the section of measurements.

    Args:
        found: Content of cards.json.
    """
    cards = dict(cards_of(found))
    (images,) = {card["images_an_epoch"] for card in cards.values()}
    (epochs,) = {card["epochs"] for card in cards.values()}
    yield sentence("{:,} images of 640 pixels", images)
    yield setting("2 % of the images have 300 to 900 boxes", "the data")
    yield setting("mosaic 1.0 and copy_paste 0.1", HOW)
    yield sentence("All trainings have {} epochs, which are {:,} images", epochs, images * epochs)
    yield setting("an optimizer step for about 256 images", HOW)
    usable = [card["memory"]["usable_mib"] for card in cards.values()]
    yield sentence("limits of {} MiB", list_of("{:,}", usable))
    yield table(MEASURED, _measured(cards))
    yield table(RATIOS, _ratios(cards))
    yield table(SEARCH, _search(cards))


def remarks(found: Mapping[str, Any]) -> Iterator[Passage]:
    """Yield the passages below the tables.

    Args:
        found: Content of cards.json.
    """
    yield sentence("images in memory, {} workers", found["t4"]["arguments"]["workers"])
    t4 = found["t4"]
    ours, stock = (t4["rows"][who] for who in ("ours", "stock"))
    yield sentence(
        "takes {:.0f} s with this package and {:.0f} s with Ultralytics", ours["epoch_s"][0], stock["epoch_s"][0]
    )
    later = [statistics.median(run["epoch_s"][1:]) for run in (ours, stock)]
    yield sentence("The epochs after it take {:.1f} s and {:.1f} s", *later)
    yield sentence("is {:.2f} times as fast", t4["summary"]["images_per_s_all_over_stock"])
    yield setting("the target of 3", "a target")
    replayed = [int(row["replayed"]) for row in journal(ours)]
    assert sizes(journal(ours)[0])[0] == 32
    assert replayed[0] > 0 == sum(replayed[1:])
    yield setting("the first step's 32 images", HOW)


def _measured(cards: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    for label, card in cards.items():
        for row, name in ROWS.items():
            if (run := card["rows"].get(row)) is None:
                continue
            speeds = [say("{:,.0f}", run[key]) if key in run else "" for key in _SPEEDS]
            peaks = ["", ""]
            if "peak_sd_mib" in run:
                peaks = [say("{:,.0f} ± {:,.0f}", run["peak_mean_mib"], run["peak_sd_mib"])]
                peaks += [say("{:,.0f} ± {:,.0f}", run["peak_mean_all_mib"], run["peak_sd_all_mib"])]
            yield [label, name, batch_of(run), *speeds, *peaks, *map(str, events(run))]


def _ratios(cards: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    for label, card in cards.items():
        ratios = card["summary"]
        if all(f"{key}_over_stock" in ratios for key in (*_SPEEDS, *_DEVIATIONS)):
            speeds = [say("{:.2f}", ratios[f"{key}_over_stock"]) for key in _SPEEDS]
            yield [label, *speeds, *(say("{:.3f}", ratios[f"{key}_over_stock"]) for key in _DEVIATIONS)]


def _search(cards: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    for label, card in cards.items():
        cells = []
        for who in ("stock", "all"):
            held = held_of(card["search"].get(who, []))
            cells += [list_of("{}", sorted(batch for batch in held if held[batch] is kind)) for kind in (True, False)]
        yield [label, *cells]


_SPEEDS = ("images_per_s_all", "images_per_s_after_first")
_DEVIATIONS = ("peak_sd_mib", "peak_sd_all_mib")


def readme_rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the figures of the rows `README`, this package's first, with those of all cards in a cell.

    Args:
        found: Content of cards.json.
    """
    for key in ("images_per_s_all", "peak_sd_mib"):
        runs = [[card["rows"][who] for _, card in cards_of(found)] for who in ("ours", "stock")]
        yield [list_of("{:,.0f}", (run[key] for run in each)) for each in runs]


if EXISTS:
    measured(HEADING)(lambda: (*passages(result("cards")), *remarks(result("cards"))))
IS_COMPLETE = EXISTS and all(
    {"ours", "stock"} <= result("cards").get(name, {}).get("rows", {}).keys() for name in CARDS
)
"""True if there are the figures of `readme_rows`."""
