"""Figures of docs/explanation, the guides and docs/design.md."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from statistics import mean

from scripts.figures.cards import CARDS, large_deviations
from scripts.figures.measured_loaders import speeds
from scripts.figures.measured_steps import HOW, averaging_table, graph_errors, limits_of, list_of
from scripts.figures.pages import Passage, result, say, section, sentence, setting, table

explained = functools.partial(section, is_whole=False)


@section("docs/explanation/plan.md", "How far off")
def predicted() -> Iterator[Passage]:
    """Yield the passages on predicted peaks."""
    found, lines = result("limits_h200")["predicted"], []
    graphs: dict[bool, list[float]] = {True: [], False: []}
    for scale in "sx":
        for row in found[f"ours-{scale}"]:
            peaks = [say("{:,.0f}", row[key]) for key in ("peak_mib", "predicted_mib")]
            name, has_graphs = f"YOLO12-{scale.upper()}, {row['limit_gib']} GiB", row["replayed"] > 0
            graphs[has_graphs].append(row["peak_mib"] / row["predicted_mib"] - 1)
            cells = [str(row["micro_batch"]), "yes" if has_graphs else "no", *peaks]
            lines.append([name, *cells, say("{:+.1f} %", row["off_percent"])])
    yield table("| | images at once | as CUDA graphs | measured, MiB | predicted, MiB | error |", lines)
    yield sentence("Without CUDA graphs, predictions are at most {:.1f} % off", 100 * max(map(abs, graphs[False])))
    more = [100 * each for each in graphs[True]]
    yield sentence("leaves out, here {:.1f} to {:.1f} % more", min(more), max(more))
    earlier = [row["off_percent"] for rows in result("checkpointing")["predicted"].values() for row in rows]
    yield sentence(
        "on an H100 without graphs, {} predictions for S, M and X were at most {:.1f} % off",
        *(len(earlier), max(map(abs, earlier))),
    )
    yield setting("holds predictions to 3 % of the figures", "the bound of a test")


@section("docs/explanation/controller.md", "Against other rules, in simulation")
def controller() -> Iterator[Passage]:
    """Yield the passages on simulated traces."""
    found = result("controller")
    ours = found["policies"]["ours"]
    yield sentence("{:,} traces of the memory that other processes hold, {:,} batches", found["traces"], found["steps"])
    why = "how it is simulated"
    yield setting("in runs of 50 traces", why)
    yield setting("launch-bound below 64 images", why)
    yield setting("by up to 20 % in bytes and times", why)
    yield setting("Peaks scatter by 1 %, times by 3 %. 5 % of the batches are crowded", why)
    yield setting("leaves 10 % of the card free", why)
    yield setting("AutoBatch: 60 % of what is free", why)
    names = {
        "ours": "this controller",
        "halving": "halve after a failure, never grow",
        "AutoBatch": "AutoBatch: 60 % of what is free at the start",
        "fixed": "what fits at the start",
        "checkpoint all": "checkpoint every layer, what fits at the start",
    }
    lines = []
    for key, name in names.items():
        total = found["policies"][key]["all"]
        score = say("{of_oracle:.3f}|{avoidable_percent:.3f}|{failures:,}|{died:,}", **total)
        lines.append([name, *score.split("|")])
    yield table(
        "| rule | images/s ÷ oracle | avoidable, % of steps | failed allocations | traces that ended in a failure |",
        lines,
    )
    first = ours["first of a run"]
    yield sentence(
        "it reaches {:.2f} of the oracle with {:.2f} % avoidable steps", first["of_oracle"], first["avoidable_percent"]
    )
    kinds = ("steady", "steps", "ramps", "bursts", "saw-tooth", "adversary", *_CARDS)
    yield table(
        f"| | {' | '.join(kinds[:6])} | fast, launch-bound | T4-like | Jetson-like |",
        [
            ["images/s ÷ oracle", *(say("{:.3f}", ours[kind]["of_oracle"]) for kind in kinds)],
            ["avoidable, %", *(say("{:.3f}", ours[kind]["avoidable_percent"]) for kind in kinds)],
        ],
    )
    yield setting("The length of a run (50 traces) and of a trace (60 steps)", why)
    yield sentence("The total is within {:.0f} % of the oracle", 5)
    assert ours["all"]["of_oracle"] >= 0.95
    assert min(kinds, key=lambda kind: ours[kind]["of_oracle"]) == _CARDS[0]


_CARDS = ("fast, waits for its host", "T4-like", "Jetson-like")


@explained("docs/explanation/exactness.md", "A loss is a fraction")
def averaging() -> Iterator[Passage]:
    """Yield the table of errors of averaged losses."""
    yield averaging_table()


@explained("docs/guides/classes.md", "Old data: `replay`")
def replay() -> Iterator[Passage]:
    """Yield what is left of the old classes with and without old images."""
    rows = result("classes")["replay"]
    before, without, old = (
        mean(row[key][1] for row in rows if row["replay_fraction"] == fraction)
        for key, fraction in (("old_before", 0), ("old_after", 0), ("old_after", 0.3))
    )
    yield sentence("a training without it left {:.2f} of {:.2f} of the old classes' AP50-95", without, before)
    yield sentence("and `replay_fraction=0.3` left {:.2f}", old)


@explained("docs/explanation/exactness.md", "Losses with several normalisers")
def exact_time() -> Iterator[Passage]:
    """Yield the time of exact gradients."""
    yield sentence("{:.1f} to {:.1f} times the time for segmentation and pose", *_exact())
    yield sentence("images on an H200, and {:.1f} times for segmentation with", _exact_with_graphs())
    yield setting("in 4 × 16 images on an H200", HOW)


def _exact() -> list[float]:
    tasks = result("exact_tasks")["tasks"]
    return [tasks[task]["exact_over_by_images"] for task in ("segment", "pose")]


def _exact_with_graphs() -> float:
    ratio: float = result("exact_tasks")["again"]["tasks"]["segment"]["exact_over_by_images"]
    return ratio


@explained("docs/explanation/exactness.md", "How it is tested")
def gradient() -> Iterator[Passage]:
    """Yield the differences of gradients."""
    off = result("memory")["gradient"]["relative_difference"]
    yield sentence("the gradients differ by {:.1e} in fp32", off["limit, fp32"])
    yield sentence(
        "16 × 16 differs from 2 × 128 by {:.3f}, and the same 16 × 16 in another memory layout differs by {:.3f}",
        *(off["limit"], off["rounding"]),
    )


@explained("docs/explanation/engine.md", "What layers keep")
def freed() -> Iterator[Passage]:
    """Yield the error of predicted bytes."""
    worst = max(abs(row["off_percent"]) for row in result("checkpointing")["freed"])
    yield sentence("differed by at most {:.2f} % on an H100", worst)


@explained("docs/explanation/engine.md", "What it writes")
def pressure() -> Iterator[Passage]:
    """Yield the run beside another process."""
    found = result("memory")["neighbour"]
    taken = 100 * max(fraction for _, fraction in found["ours"]["card_taken"])
    yield sentence("took and released up to {:.0f} % of the card at random times", taken)
    yield sentence("All {} updates were made and no allocation failed", found["ours"]["summary"]["updates"])
    yield sentence("its {} images do not fit on this card", found["batch"])


@explained("docs/explanation/engine.md", "Small micro-batches")
def graphs() -> Iterator[Passage]:
    """Yield what CUDA graphs gain."""
    speed: dict[tuple[str, int], list[float]] = {}
    for row in result("step")["rows"]:
        speed.setdefault((row["variant"], row["micro_batch"]), []).append(row["images_per_s"])
    gains = [min(a / b for a, b in zip(speed["graphs", micro], speed["now", micro], strict=True)) for micro in (32, 8)]
    least = (math.floor(10 * gain) / 10 for gain in gains)
    words = (
        "in micro-batches of 32 images became at least {:.1f} times as fast, and one in micro-batches of 8 at least "
    )
    yield sentence(f"{words}{{:.1f}} times", *least)


@explained("docs/explanation/engine.md", "Where it does not apply")
def limits() -> Iterator[Passage]:
    """Yield the costs that the engine has."""
    found = result("memory")
    words = "Segmentation and pose took {:.1f} and {:.1f} times as long in 4 × 16 images, and segmentation {:.1f} times"
    yield sentence(words + " with", *_exact(), _exact_with_graphs())
    first = [row["first_s"] for row in found["first_times"]]
    yield sentence("{:.0f} to {:.0f} s each for YOLOv12-S in deterministic mode", min(first), max(first))
    small, large = ({row["micro_batch"]: row for row in found["overhead"]}[micro] for micro in (32, 128))
    ms = (row["bare_ms"] * row["micro_batch"] / 256 for row in (small, large))
    yield sentence("A bare loop took {:.0f} ms for 32 images and {:.0f} ms for 128", *ms)
    yield sentence("a step took {:.2f} times as long as this loop in micro-batches of 32", small["engine_over_bare"])
    yield sentence("and {:.2f} times in micro-batches of 128", large["engine_over_bare"])


@explained("docs/explanation/data.md", "The same images on any hardware")
def partners() -> Iterator[Passage]:
    """Yield the passages on the other images of a mosaic, and on the time of draws by place."""
    training, cost = result("partners")["map"], result("partners")["cost"]
    arguments, rows = training["arguments"], training["rows"]
    yield sentence(
        "{} drawn images of {} pixels, batches of {}, {} epochs, mosaic in the first {}",
        *(training["images"], training["imgsz"], arguments["batch"], arguments["epochs"]),
        arguments["epochs"] - arguments["close_mosaic"],
    )
    names = {
        "batch": "the batch of 16 images",
        "last 64": "the last 64 images of the order",
        "all": "all images",
    }
    means = {choice: mean(rows[choice]) for choice in names}
    yield table(
        f"| other images of a mosaic come from | {' | '.join(f'seed {seed}' for seed in training['seeds'])} | mean |",
        [[name, *(say("{:.3f}", each) for each in (*rows[key], means[key]))] for key, name in names.items()],
    )
    apart, of_seeds = max(means.values()) - min(means.values()), max(max(row) - min(row) for row in rows.values())
    yield sentence("their means differ by at most {:.3f}, and the seeds of one choice by up to {:.3f}", apart, of_seeds)
    assert apart < of_seeds  # seeds do not tell the choices apart
    yield sentence(
        "An image took {:.2f} ms of CPU time from JPEG files with draws by place and {:.2f} ms without, and {:.2f} and "
        "{:.2f} ms with `cache=ram`: medians of {} batches",
        *(cost[name][f"{key}_cpu_ms"] for name in ("files", "ram") for key in ("by_place", "without")),
        cost["batches"],
    )
    ratios = [cost[name]["ratio"] for name in ("files", "ram")]
    yield sentence("the ratios of such pairs of batches are {:.3f} and {:.3f}, on both sides of 1", *ratios)
    assert min(ratios) < 1 < max(ratios)


@explained("docs/explanation/data.md", "The same images for less")
def loader() -> Iterator[Passage]:
    """Yield the ratios of CPU time."""
    found = result("loader")
    yield sentence(
        "Ultralytics takes {:.1f} times as much CPU time for an image from JPEG files with mosaic, and {:.1f} times as "
        "much with",
        *(found[name]["ratio"] for name in ("files", "ram")),
    )


@explained("docs/explanation/data.md", "The number of workers")
def workers() -> Iterator[Passage]:
    """Yield what the choice is made with, and what more workers gain."""
    gain = mean(speeds("files", 15)) / mean(speeds("files", 8))
    yield setting("On a machine with 16 cores", "the machine")
    yield sentence("15 workers loaded {:.2f} times as many images from files as 8", gain)
    yield setting("does not take at least 3 % less time", "a threshold of the choice")


@explained("docs/guides/resume.md", "When a run is saved")
def saving() -> Iterator[Passage]:
    """Yield the time of a save."""
    small, large = result("dense")["saving"]
    yield sentence("A save takes {:.1f} s for YOLOv12-S and {:.0f} s for X", small["median_s"], large["median_s"])
    yield sentence("{:.2f} % and {:.1f} % of five minutes", small["percent_at_5min"], large["percent_at_5min"])


@explained("docs/design.md", "Budgets")
def design() -> Iterator[Passage]:
    """Yield each budget, what was measured, and whether the budget is met."""
    memory = result("memory")
    curve = [(who, each["gib"], each[who]) for each in limits_of("s") for who in ("ours", "stock")]
    at = {(who, gib): row["images_per_s"] for who, gib, row in curve}
    ahead = min(row["ratio"] for row in result("training")["ratios"])
    alike, other = (max(map(abs, errors)) for errors in graph_errors())
    worst = max(alike, other)
    pressed = memory["neighbour"]["ours"]
    taken = 100 * max(fraction for _, fraction in pressed["card_taken"])
    cost = max(row["engine_over_bare"] for row in memory["overhead"])
    longer = result("endurance_gpu")["neighbour"]["ours"]
    failures = pressed["summary"]["out_of_memories"] + longer["out_of_memories"]
    assert (pressed["exit_status"], longer["exit_status"]) == (0, 0)
    speed = at["ours", 16] / at["stock", 16]
    kept = at["ours", 16] / at["ours", 80]
    found = result("cards")
    cards = [found[card]["summary"] for card in CARDS]
    whole = result("cards_100")["t4"]["summary"]
    spreads = [each["peak_sd_mib_over_stock"] for each in (*cards, whole)]
    dense = [each["images_per_s_all_over_stock"] for each in (whole, *cards)]
    assert max(spreads) <= 0.1
    assert dense[0] >= 3 > 2.5 > max(dense[1:])
    rows = [
        (
            "16 GiB: at least 2 times the images/s of stock at its largest stable batch",
            say("{:.2f}", speed),
            speed >= 2,
        ),
        (
            "the same on label-dense data, without validation: at least 2.5 times",
            say("{:.2f} in 100 epochs, {:.2f} in 16", *dense[:2]),
            "in 100 epochs",
        ),
        ("16 GiB: at least 0.9 of our own speed at 80 GiB", say("{:.2f}", kept), kept >= 0.9),
        (
            "the engine's own cost: a step takes at most 1.01 times as long as a bare loop",
            say("{:.3f}, with what it saves", cost),
            cost <= 1.01,
        ),
        ("predicted peak: at most 3 % off, in every step", say("{:.1f} %", worst), worst <= 3),
        (
            "standard deviation of the peak of a step: at most 0.1 of stock's",
            list_of("{:.3f}", spreads),
            "in these four; in three of five others",
        ),
        (
            "no failure while another process takes and releases up to 40 % of the card",
            say("{}, with up to {:.0f} and {:.0f} %", failures, taken, 100 * longer["most_of_card"]),
            failures == 0,
        ),
        ("trainings from image files ahead of stock on the same machine", say("{:.2f} times", ahead), ahead > 1),
    ]
    words = {True: "yes", False: "no"}
    cells = [[budget, told, words.get(met, met)] for budget, told, met in rows]
    yield table("| budget | measured | met |", cells)
    yield sentence("predictions are at most {:.2f} % off", alike)
    words = "[2.5 times stock at 16 GiB (met), and for YOLO12-X 0.8 of its own speed at 80 GiB (missed)]"
    yield setting(words, "targets; figures are in that section")
    yield setting("in batches of 128, [from the second epoch", HOW)
    yield setting("[16 epochs in that of a T4", HOW)
    yield setting("and 3 times stock on label-dense data", "a target")
    yield sentence("[{:.2f} times in 100 epochs]", dense[0])
    yield sentence("(met), and {:.2f} times in 16 epochs (missed)", dense[1])
    yield setting("and of a T4 in 100 epochs", HOW)
    yield setting("in the memory of a T4, an A10 and an A100 in 16 epochs", HOW)
    yield setting("In two of five [other trainings of 16 epochs]", "asserted above")
    yield sentence("they were {:.2f} and {:.2f} of stock's: the controller", *large_deviations(found))
    words = "Over all steps, they are {:.2f}, {:.2f}, {:.2f} and {:.2f} of stock's"
    yield sentence(words, *(each["peak_sd_all_mib_over_stock"] for each in (*cards, whole)))
    yield sentence("{:.2f}, {:.2f} and {:.2f} times as fast as stock over all 16 epochs", *dense[1:])
    runs = [found[card]["rows"]["ours"] for card in CARDS]
    firsts = [100 * run["epoch_s"][0] / sum(run["epoch_s"]) for run in runs]
    yield sentence("of which the first takes {:.0f} to {:.0f} % of the time", min(firsts), max(firsts))
