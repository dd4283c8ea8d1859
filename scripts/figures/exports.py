"""Figures of docs/explanation/export.md and docs/explanation/ranks.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import median
from typing import Any

from scripts.figures.measured_steps import HOW
from scripts.figures.pages import Passage, result, say, section, sentence, setting, table

RANKS = "docs/explanation/ranks.md"


@section("docs/explanation/export.md", "Measured")
def exports() -> Iterator[Passage]:
    """Yield the passages on exported graphs."""
    found = result("export")
    rows = {(row["model"], row["imgsz"], row["dynamic"], row["share"]): row for row in found["agree"]}
    lines = []
    for (model, size, dynamic, share), split in rows.items():
        if share == 1.0:
            continue
        whole = rows[model, size, dynamic, 1.0]
        mib = [row["planned_bytes"] / 2**20 for row in (whole, split)]
        lines.append(
            [
                f"{model} {size}",
                "dynamic" if dynamic else "static",
                say("{:.0g}", split["boxes_off_pixels"]).replace("e-0", "e-"),
                say("{:.0e}", split["scores_off"]),
                say("{:.1f} → {:.1f}", *mib),
                say("{:.3f} / {:.3f}", whole["planned_of_measured"], split["planned_of_measured"]),
                str(len(split["cuts"])),
            ]
        )
    yield table(
        "| | | largest difference: boxes, px | scores | planned MiB, unsplit → split "
        "| planned ÷ measured, unsplit / split | splits |",
        lines,
    )
    yield setting("except in the row with 512 MiB and the row with 256 MiB", "labels of rows")
    lines = []
    for row in found["rtx"]:
        name = re.sub("cut to 1$|uncut", "unsplit", row["model"]).replace(" cut ", " split ")
        took = row["outcome"] + (say(", {:.1f} s", row["seconds"]) if row["outcome"] == "built" else "")
        mib = [say("{:.0f}", row[key] / 2**20) for key in ("tensors_bytes", "workspace_bytes")]
        lines.append([f"{name}, {row['imgsz']}", *mib, took])
    yield table("| | tensors, planned MiB | workspace MiB | result, time to build |", lines)


@section(RANKS, "Shares", is_whole=False)
def shares() -> Iterator[Passage]:
    """Yield the simulated shares of ranks."""
    found = result("shares")
    fleets = [row for row in found["fleets"] if (row["fleet"], row["bn_group"]) == ("mixed", 32)]
    rows = {
        "speed ÷ speed with equal shares": "{to_equal:.2f} ×",
        "speed ÷ ideal speed, after learning": "{to_ideal_once_learned:.0%}",
        "best possible speed with whole groups ÷ ideal speed": "{whole_groups_to_ideal:.0%}",
        "changes in 2,000 steps": "{moves:.1f}",
        "planning time, ms per step": "{plan_ms:.2g}",
    }
    yield table(
        "| ranks | 2 | 4 | 8 | 64 | 256 | 1024 |",
        [[name, *(say(cell, **row).replace("%", " %") for row in fleets)] for name, cell in rows.items()],
    )
    equal = [row["to_equal"] for row in found["fleets"] if row["fleet"] == "equal"]
    yield sentence("shares by speed are {:.2f} to {:.2f} times as fast as equal shares", min(equal), max(equal))
    small = [
        100 * row["to_ideal_once_learned"] for row in found["fleets"] if (row["fleet"], row["bn_group"]) == ("mixed", 8)
    ]
    yield sentence("With groups of 8 images, {:.0f} to {:.0f} % of the ideal speed", min(small), max(small))
    growth = found["plan_growth_256_to_1024"]["32"]
    yield sentence("From 256 to 1,024 ranks, the planning time grows {:.1f} times", growth)


def augmentation(speed: dict[str, Any]) -> str:
    """Return how the images of a comparison of speeds were made.

    Args:
        speed: Part `speed` of ranks.json or ranks_four.json; older files do not say it, and augmented no images.
    """
    return "augmented as by default" if speed.get("is_augmented") else "not augmented"


def _rates(found: dict[str, Any]) -> dict[tuple[str, int], float]:
    return {(row["who"], row["gpus"]): row["images_per_s"] for row in found["rows"]}


@section(RANKS, "Measured")
def ranks() -> Iterator[Passage]:
    """Yield the passages on several GPUs."""
    two, four = result("ranks"), result("ranks_four")
    yield setting("YOLOv12-S at 640 in fp16", HOW)
    (commit,) = {head["commit"] for head in four["measured_on"].values()}
    yield sentence("at commit {}.", commit)
    yield setting("Speed of trainings with 128 images per GPU", HOW)
    speed, earlier = _rates(four["speed"]), _rates(two["speed"])
    gpus = (1, 2, 4)
    lines = [
        [name, *(say("{:,.0f}", speed[who, count]) for count in gpus)]
        for who, name in (("ours", "this package, images/s"), ("stock", "Ultralytics, images/s"))
    ]
    over = [say("{:.2f}", speed["ours", count] / speed["stock", count]) for count in gpus]
    lines.append(["this package ÷ Ultralytics", *over])
    for who, name in (("ours", "this package"), ("stock", "Ultralytics")):
        scaling = [say("{:.2f}", speed[who, count] / speed[who, 1]) for count in gpus[1:]]
        lines.append([f"{name} ÷ its speed on one GPU", "1", *scaling])
    yield table("| GPUs | 1 | 2 | 4 |", lines)
    yield sentence("Images are in memory and are {}. Each training", augmentation(four["speed"]))
    yield sentence(
        "In another run on one and two GPUs, with images that are {}, this package reached {:,.0f} and {:,.0f} "
        "images/s and Ultralytics {:,.0f} and {:,.0f}, a ratio of {:.2f} and {:.2f}",
        augmentation(two["speed"]),
        *(earlier[who, count] for who in ("ours", "stock") for count in (1, 2)),
        *(earlier["ours", count] / earlier["stock", count] for count in (1, 2)),
    )
    yield from _four_gpus(four["squeeze"])
    yield from _two_gpus(two["squeeze"])
    yield from _shared_card(two["shared_card"])
    yield from _gradient(two["gradient"])
    yield sentence("The other process ends {:.0f} s later with status 1", two["death"]["ended_s"])
    yield sentence("With four processes, it takes {:.0f} s", four["death"]["ended_s"])
    first = two["squeeze_on_four"]
    yield sentence("The run made {} steps of {:,} images until its time was over", first["steps"], first["batch"])
    costs = two["checksum"]
    both = [costs["checksum_ms"][f"yolov12{scale}.yaml"] for scale in "sx"]
    percent = [costs["percent_of_100_steps"][f"yolov12{scale}.yaml"] for scale in "sx"]
    yield sentence("the comparison of weights takes {:.0f} ms (S) or {:.0f} ms (X)", *both)
    yield sentence("This is {:.1f} to {:.1f} % of the time of a hundred steps", *percent)
    yield sentence(
        "take {:.2f} ms, which is {:.1f} % of a step", costs["agree"]["median_ms"], costs["agree_percent_of_a_step"]
    )


def _made_all(found: dict[str, Any]) -> None:
    assert found["summary"]["updates"] == found["summary"]["updates_expected"] == found["steps"]
    assert found["sums_exact"]


def _four_gpus(found: dict[str, Any]) -> Iterator[Passage]:
    _made_all(found)
    assert len(found["injected"]) == 5
    yield sentence("Batches of {:,} images of the demonstration data", found["batch"])
    yield setting("another process takes all but 4 GiB of the second GPU. Five", HOW)
    yield sentence("The run made all {} updates of {:,} images and survived all", found["steps"], found["batch"])
    shares_ = found["phases"]["during"]["mean_shares"]
    yield sentence("from 256 each to {:.0f}, {:.0f}, {:.0f} and {:.0f} on average", *shares_)


def _two_gpus(found: dict[str, Any]) -> Iterator[Passage]:
    _made_all(found)
    assert len(found["injected"]) == 5
    rows = [[cell.split(", ") for cell in line.split(" | ")] for line in found["rows"]]
    yield sentence("Batches of {} images. For sixty steps", found["batch"])
    yield setting("another process takes all but 4 GiB of the second GPU, in four parts", HOW)
    yield sentence("The run made all {} updates of {} images, survived five", found["steps"], found["batch"])
    yield setting(
        "The second GPU went from 256 images at once to 8, and then to eight micro-batches of 32", "its events"
    )
    changed = next(step for step, row in enumerate(rows) if row[1] == ["424", "88"])
    again = next(step for step, row in enumerate(rows) if row[1] == ["288", "224"])
    short = [[float(row[7][rank]) for row in rows[changed - 10 : changed]] for rank in (0, 1)]
    yield sentence(
        "A step then took {:.1f} s on the second GPU and {:.2f} s on the first",
        *(median(short[1]) / 1000, median(short[0]) / 1000),
    )
    yield setting("The shares changed to 424 and 88", "the rows in which this is looked up")
    released = found["pressure"]["to_step"]
    slowest = [max(map(float, row[7])) for row in rows[changed + 1 : released]]
    yield sentence("With them, a step takes {:.2f} s until the memory is released", median(slowest) / 1000)
    least = next(step for step, row in enumerate(rows) if "8" in row[2][1].split())
    yield sentence("This change came {} steps after the step with 8 images at once", changed - least)
    why = "3 workers had drawn 4 batches each, and one batch was running; today they draw 2"
    yield setting("after 16 steps the new speed was accepted, and workers had already drawn 13 batches", why)
    yield setting("Today they would have drawn 7", why)
    grown = next(step for step, row in enumerate(rows) if step > found["pressure"]["to_step"] and row[2][1] == "88")
    yield sentence(
        "The micro-batches of the second GPU grew to 88 images in {} steps. In {} more steps, the shares changed to "
        "288 and 224",
        *(grown + 1 - found["pressure"]["to_step"], again - grown),
    )
    yield sentence("with which a step takes {:.0f} ms", max(found["phases"]["after"]["median_step_ms"]))
    before = max(found["phases"]["before"]["median_step_ms"])
    yield sentence(
        "Equal shares would take {:.0f} ms less", round(max(found["phases"]["after"]["median_step_ms"]) - before, -1)
    )
    yield setting("added up to 4 s, the price of a change", "a constant")


def _shared_card(found: dict[str, Any]) -> Iterator[Passage]:
    _made_all(found)
    assert found["summary"]["out_of_memories"] == 0
    phases = found["phases"]
    yield sentence("over gloo, batches of {} images, limits of 40 and 16 GiB", found["batch"])
    least = min(phases["during"]["least_budgets_mib"]) / 1024
    yield sentence("so that only 4 GiB and later {:.1f} GiB are left", least)
    yield sentence("The run made all {} updates, each of {} images, and no", found["steps"], found["batch"])
    sizes = re.findall(r"(?:shrunk|grew) (\d+) to (\d+)", " ".join(found["events"][0]))
    released = ", ".join(to for _, to in sizes[:5])
    yield sentence("went from 64 to {} and 24 images", released)
    assert (sizes[5], [64, 64], [48, 80]) == (
        ("16", "24"),
        *(phases[when]["mean_shares"] for when in ("before", "after")),
    )
    yield setting("and the shares from 64 and 64 to 48 and 80. The shares stayed at 48 and 80", "asserted above")
    after, before = (max(phases[when]["median_step_ms"]) for when in ("after", "before"))
    yield sentence("A step takes {:.0f} ms with them and {:.0f} ms with equal shares", after, before)
    yield setting("not worth the 4 s of a change", "a constant")


def _gradient(found: dict[str, Any]) -> Iterator[Passage]:
    single, half = found["fp32"], found["half"]
    yield sentence("{} images on four GPUs, in shares of {}, {}, {} and {}", found["images"], *found["shares"])
    yield sentence("the gradients differ by {:.1e}", single["ranks_against_one"])
    yield sentence(
        "another split of the batch differs by {:.1e}, and the same split in a second run by {:.1e}",
        *(single["one_cut_otherwise"], single["one_twice"]),
    )
    yield sentence(
        "the difference is {:.1e} between four GPUs and one, and {:.1e} between two splits",
        *(half["ranks_against_one"], half["one_cut_otherwise"]),
    )
