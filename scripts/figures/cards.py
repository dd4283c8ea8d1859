"""Figures of benchmarks/cards.py: trainings in the memory of smaller cards.

`passages` and `remarks` have the section of docs/reference/measurements.md, and `readme_rows` the rows of both READMEs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.dense_search import held_of
from scripts.figures.measured_steps import HOW, list_of, measured, sizes
from scripts.figures.measured_trainings import journal
from scripts.figures.pages import Passage, result, say, sentence, setting, table

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
    "label-dense data, 100 epochs of 1,536 images without validation, memory of a T4: YOLO12-S, images/s": (
        "标注密集的数据，1,536 张图像训练 100 个 epoch，不做验证，显存相当于 T4：YOLO12-S，图像/秒"
    ),
    "the same in 16 epochs, memory of a T4 (on another host), an A10 and an A100 40 GB": (
        "同上，16 个 epoch，显存相当于 T4（另一台主机）、A10 和 A100 40 GB"
    ),
    "the same without the first epoch, in which kernels are compiled and searched": (
        "同上，不计编译和搜索 kernel 的第一个 epoch"
    ),
    "16 epochs, memory of a T4, another host; rivals: AutoBatch, our model recomputed, (a third host) a halved batch": (
        "16 个 epoch，显存相当于 T4，另一台主机；对比方案：AutoBatch、我们的模型全部层重计算、（第三台主机）batch 减半"
    ),
    "batch of these trainings: T4, A10, A100 (and AutoBatch, all layers recomputed, a halved batch)": (
        "以上训练的 batch：T4、A10、A100（以及 AutoBatch、全部层重计算、减半的 batch）"
    ),
    "standard deviation of the peak of a step, second half, MiB: 100 epochs; 16 epochs (five trainings beside these)": (
        "以上训练后一半中每步显存峰值的标准差，MiB：100 个 epoch；16 个 epoch（另外五次训练）"
    ),
    "the same, of all steps": "同上，全部训练步",
}
"""First cell of each row of `readme_rows` in both languages."""


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
    yield table(MEASURED, measured_rows(cards))
    yield table(RATIOS, ratio_rows(cards))
    yield table(SEARCH, _search(cards))


def remarks(found: Mapping[str, Any]) -> Iterator[Passage]:
    """Yield the passages around the tables that are of this file only.

    Args:
        found: Content of cards.json.
    """
    cards = dict(cards_of(found))
    runs = {who: [card["rows"][who] for card in cards.values()] for who in ("ours", "stock")}
    t4, a10, a100 = (found[name] for name in CARDS)
    rows = t4["rows"]
    (commit,) = {rows[who]["commit"] for who in ROWS if who != "halving"}
    (latest,) = {run["commit"] for run in (*a10["rows"].values(), *a100["rows"].values(), rows["halving"])}
    hosts = {card: found["measured_on"][card]["hosts"] for card in CARDS}
    assert hosts["t4"] == {"ours": "A", "stock": "A", "autobatch": "B", "all": "B", "halving": "C"}
    assert hosts["a10"] == hosts["a100"] == {"ours": "C", "stock": "C"}
    yield sentence("rows of the T4 ran on one host at commit {},", commit)
    yield sentence("on a third host at commit {}, as did the halved batch", latest)
    yield setting("alone on its GPU, with 16 cores", HOW)
    yield sentence("images in memory, {} workers", t4["arguments"]["workers"])
    ratios = [t4["summary"][f"{key}_over_stock"] for key in _SPEEDS]
    assert ratios[0] < 3 < ratios[1]
    yield setting("the target is 3 times the speed of Ultralytics", "a target")
    yield sentence("missed over the whole training ({:.2f}) and met without the first epoch ({:.2f})", *ratios)
    setups = (list_of("{:.1f}", (run["setup_s"] for run in each)) for each in runs.values())
    yield sentence(
        "begins: {} s with this package, where other processes already compile kernels, and {} s with Ultralytics",
        *setups,
    )
    ratios = list(map(with_setup, *runs.values()))
    yield sentence("With it, this package is {} times as fast", list_of("{:.2f}", ratios))
    yield from _first_epochs(runs)
    yield from _hosts(found)
    yield from _rivals(found)
    tried = _tried(a10["rows"]["ours"]), _tried(a100["rows"]["ours"])
    assert all({max(sizes(row)) for row in rows} == {256} for rows in tried)
    yield sentence("the controller tried all 256 images at once, in {} and {} steps,", *map(len, tried))
    slowest = [max(card["rows"]["ours"]["epoch_s"][1:]) for card in (a10, a100)]
    yield sentence("The slowest of these epochs took {:.1f} and {:.1f} s", *slowest)
    assert all(int(rows[-1]["step"]) <= 48 for rows in tried)
    yield setting("in two of the five trainings above", "asserted above")
    yield sentence("deviated by {:.2f} and {:.2f} times what Ultralytics' do", *large_deviations(found))
    assert [card["summary"]["peak_sd_all_mib_over_stock"] > 1 for card in (t4, a10, a100)] == [True, False, False]
    for run in runs["ours"]:
        summary = run["summary"]
        assert summary["updates"] == summary["updates_expected"] == 96
        assert (summary["out_of_memories"], summary["images_lost"], run["allocator_failures"]) == (0, 0, 0)
        assert run["failure"] is None
    replayed = [sum(int(row["replayed"]) == len(sizes(row)) for row in journal(run)) for run in runs["ours"]]
    yield sentence(
        "all {} updates of each training were made. In {} of them, all micro-batches ran as CUDA graphs",
        *(runs["ours"][0]["summary"]["updates"], list_of("{}", replayed)),
    )
    short = [_held(card, epochs=2) for card in (a10, a100)]
    yield sentence("batches of {} and {} held on an A10 and an A100", *short)
    yield sentence("went down to {} and {}", *(card["rows"]["stock"]["batch"] for card in (a10, a100)))


def large_deviations(found: Mapping[str, Any]) -> list[float]:
    """Return those above a tenth of the deviations of peaks, relative to Ultralytics', in trainings beside the table.

    These are two of five, as the texts say.

    Args:
        found: Content of cards.json.
    """
    others = [run["peak_sd_mib"] / stock["peak_sd_mib"] for stock, run in _others(found)]
    large = [spread for spread in others if spread > 0.1]
    assert (len(others), len(large)) == (5, 2)
    return large


def _others(found: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return Ultralytics' training of the table and this package's, for each of the latter that is beside the table."""
    parts = found["again"], found["earlier"]
    return [(found[card]["rows"]["stock"], part[card]["ours"]) for part in parts for card in CARDS if card in part]


def with_setup(ours: Mapping[str, Any], stock: Mapping[str, Any]) -> float:
    """Return how many times as fast the first of two trainings is, with the time before its first epoch."""
    taken = [run["setup_s"] + run["epoch_end_s"][-1] for run in (ours, stock)]
    assert ours["images"] == stock["images"]
    return float(taken[1] / taken[0])


def _first_epochs(runs: Mapping[str, list[dict[str, Any]]]) -> Iterator[Passage]:
    firsts = {who: list_of("{:.1f}", (run["epoch_s"][0] for run in each)) for who, each in runs.items()}
    yield sentence("takes {} s with this package and {} s with Ultralytics (T4, A10, A100)", *firsts.values())
    longer = [ours["epoch_s"][0] - stock["epoch_s"][0] for ours, stock in zip(*runs.values(), strict=True)]
    assert min(longer) > 3
    yield sentence("This package is {} s slower, which misses the aim of 3 s", list_of("{:.1f}", longer))
    later = [list_of("{:.1f}", (statistics.median(run["epoch_s"][1:]) for run in each)) for each in runs.values()]
    yield sentence("The epochs after it take {} s and {} s", *later)
    parts = [[100 * run["epoch_s"][0] / sum(run["epoch_s"]) for run in each] for each in runs.values()]
    yield sentence(
        "a large part: {} % of the time with this package and {} % with Ultralytics",
        *(list_of("{:.0f}", each) for each in parts),
    )
    yield setting("In 16 epochs as short as these", HOW)


def _hosts(found: Mapping[str, Any]) -> Iterator[Passage]:
    """Yield what differs between hosts."""
    whole = [attempt for attempt in found["t4"]["search"]["stock"] if attempt["epochs"] == 16]
    assert {attempt["batch"] for attempt in whole} == {24}
    yield setting("whole trainings of Ultralytics with 24 images", HOW)
    yield sentence("took {} s in four runs", list_of("{:.0f}", (attempt["ended_after_s"][-1] for attempt in whole)))
    again, earlier = found["again"], found["earlier"]
    assert {again["hosts"][card]["ours"] for card in CARDS} == {"B"}
    assert again["hosts"]["a100"]["stock"] == earlier["hosts"]["a10"]["ours"] == "A"
    assert earlier["hosts"]["a100"] == {"ours": "D", "stock": "D"}
    ours = [again[name]["ours"] for name in CARDS]
    (commit,) = {run["commit"] for run in (*ours, again["a100"]["stock"], earlier["a10"]["ours"])}
    assert commit == found["t4"]["rows"]["ours"]["commit"]
    speeds = [each["stock"]["images_per_s_all"] for each in (again["a100"], found["a100"]["rows"])]
    yield sentence("Ultralytics had {:.0f} images/s on the host of the T4 (`again` in the JSON), and {:.0f}", *speeds)
    yield sentence(
        "On the host of the next section, at commit {}, this package had {} images/s and a first epoch of {} s, and "
        "their peaks deviated by {} MiB",
        commit,
        list_of("{:.0f}", (run["images_per_s_all"] for run in ours)),
        list_of("{:.1f}", (run["epoch_s"][0] for run in ours)),
        list_of("{:.0f}", (run["peak_sd_mib"] for run in ours)),
    )
    yield sentence("had {:.0f} images/s with the memory of an A10", earlier["a10"]["ours"]["images_per_s_all"])
    ours, stock = (earlier["a100"][who] for who in ("ours", "stock"))
    yield sentence(
        "On a fourth host, at commit {}, it had {:.0f} images/s with that of an A100",
        ours["commit"],
        ours["images_per_s_all"],
    )
    yield sentence("{:.2f} times as many as Ultralytics there", ours["images_per_s_all"] / stock["images_per_s_all"])
    yield sentence("and its peaks deviated by {:.0f} MiB", ours["peak_sd_mib"])


def _rivals(found: Mapping[str, Any]) -> Iterator[Passage]:
    """Yield how the rows of rivals compare with this package on the same host."""
    rows, ours = found["t4"]["rows"], found["again"]["t4"]["ours"]
    ratios = [ours["images_per_s_all"] / rows[who]["images_per_s_all"] for who in ("autobatch", "all")]
    yield sentence("{:.2f} times as fast as with AutoBatch and {:.2f} times as fast as", *ratios)
    stock = result("cards_100")["t4"]["rows"]["stock"]
    assert stock["commit"] == rows["all"]["commit"]
    speed = rows["stock"]["images"] / stock["epoch_end_s"][found["t4"]["epochs"] - 1]
    yield sentence("had {:.0f} images/s in its first 16 epochs there", speed)
    assert speed < rows["all"]["images_per_s_all"]
    yield sentence("AutoBatch chose {} images", rows["autobatch"]["started_at"])
    halved = rows["halving"]
    assert (halved["halvings"], halved["assigner_fallbacks"]) == (3, 1)
    yield setting("The halved batch failed three times", "asserted above")
    yield sentence("until it had {} images. Ultralytics then", halved["ran_at"])
    yield sentence("and it had {:.0f} images/s over all epochs", halved["images_per_s_all"])


def _tried(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the steps with more images at once than the first and the last step have."""
    rows = journal(dict(run))
    usual = max(sizes(rows[0]))
    assert usual == max(sizes(rows[-1]))
    return [row for row in rows if max(sizes(row)) > usual]


def _held(card: Mapping[str, Any], epochs: int) -> int:
    """Return the largest batch that held in runs of a number of epochs."""
    tries = (attempt for attempt in card["search"]["stock"] if attempt["epochs"] == epochs and attempt["held"])
    return max(attempt["batch"] for attempt in tries)


def measured_rows(cards: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the rows of `MEASURED`."""
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


def ratio_rows(cards: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the rows of `RATIOS`."""
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


def readme_rows(found: Mapping[str, Any], long: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows `README`: names of the JSON files, and the figures, this package's first.

    Args:
        found: Content of cards.json.
        long: Content of cards_100.json.
    """
    whole, later, half, every = (_of_both(found, key) for key in (*_SPEEDS, *_DEVIATIONS))
    yield "cards_100", _of_both(long, _SPEEDS[0])
    yield "cards", whole
    yield "cards", later
    rivals = [found["t4"]["rows"][who] for who in ("autobatch", "all", "halving")]
    ours = say("{:,.0f}", found["again"]["t4"]["ours"][_SPEEDS[0]])
    yield "cards", [ours, list_of("{:,.0f}", (run[_SPEEDS[0]] for run in rivals))]
    batches = _of_both(found, "batch")
    yield "cards", [batches[0], f"{batches[1]} ({list_of('{}', (run['ran_at'] for run in rivals))})"]
    half[0] += f" ({list_of('{:,.0f}', (run['peak_sd_mib'] for _, run in _others(found)))})"
    for key, spread in zip(_DEVIATIONS, (half, every), strict=True):
        yield "cards_100 cards", ["; ".join(pair) for pair in zip(_of_both(long, key), spread, strict=True)]


def _of_both(found: Mapping[str, Any], key: str) -> list[str]:
    """Return a figure of this package and of Ultralytics, with all cards in a cell."""
    runs = [[card["rows"][who] for _, card in cards_of(found)] for who in ("ours", "stock")]
    return [list_of("{:,.0f}", (run[key] for run in each)) for each in runs]


@measured(HEADING)
def smaller_cards() -> Iterator[Passage]:
    """Yield the passages of the section."""
    yield from passages(result("cards"))
    yield from remarks(result("cards"))
