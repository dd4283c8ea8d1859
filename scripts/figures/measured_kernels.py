"""Kernels, exact tasks and imports in docs/reference/measurements.md."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

from scripts.figures.measured_steps import HOW, list_of, measured
from scripts.figures.pages import Passage, result, say, sentence, setting, table


@measured("Exact gradients of segmentation and pose")
def exact_tasks() -> Iterator[Passage]:
    """Yield the passages on exact gradients of segmentation and pose."""
    found = result("exact_tasks")["tasks"]
    yield setting("64 images of 640 pixels in BatchNorm groups of 16", HOW)
    rows = []
    for how, name in (
        ("at once", "at once"),
        ("exact", "4 × 16, `exact=True`"),
        ("by images", "4 × 16, `exact=False`"),
    ):
        cells = []
        for task in ("segment", "pose"):
            row, error = found[task][how], found[task][how]["gradient_error"]
            told = say("{:.1f} %", 100 * error) if error > 1e-3 else say("{:.0e}", error) if error else "reference"
            cells.append(say("{:.0f} ms, {:,.0f} MiB, {}", row["ms"], row["peak_mib"], told))
        rows.append([name, *cells])
    yield table(
        "| how the batch runs | segmentation: step, peak, error in fp32 | pose: step, peak, error in fp32 |", rows
    )
    ratios = [found[task]["exact_over_by_images"] for task in ("segment", "pose")]
    yield sentence("takes {:.2f} times as long for segmentation and {:.2f} times for pose", *ratios)
    yield setting("micro-batches of 16 images are launch-bound", HOW)
    again = result("exact_tasks")["again"]
    yield sentence("of segmentation (2026-12-01, at commit {}, `again` in the JSON)", again["commit"])
    rows = again["tasks"]["segment"]
    exact, by_images, ratio = rows["exact"], rows["by images"], rows["exact_over_by_images"]
    words = "{:.0f} ms with `exact=True` and {:.0f} ms without it, {:.2f} times as long"
    yield sentence(words, exact["ms"], by_images["ms"], ratio)
    before = found["segment"]["exact"]["gradient_error"]
    yield sentence("of `exact=True` was {:.1f} % there, in place of {:.0e}", 100 * exact["gradient_error"], before)


@measured("Importing Ultralytics")
def imports() -> Iterator[Passage]:
    """Yield the passages on the time of an import."""
    found = result("imports")
    median, least = found["median_cpu_s"], found["least_cpu_s"]
    ratio = found["ours_over_stock"]["median"]
    yield sentence(
        "a median of {:.2f} s with this package and {:.2f} s without it ({:.2f} times)",
        *(median["ours"], median["stock"], ratio),
    )
    yield sentence("The minimum is {:.2f} s with it and {:.2f} s without it", least["ours"], least["stock"])


@measured("The step, kernel by kernel")
def step() -> Iterator[Passage]:
    """Yield the passages on the kernels of a step."""
    found = result("step")
    yield setting("the backward pass of 256 images, YOLO12-S at 640 in fp16, BatchNorm groups of 32", HOW)
    yield sentence("*Before* is commit {}, with which the targets below were set", found["before"])
    yield sentence("*Now* is commit {}: images", found["commit"])

    rows = functools.partial(_rows, found)

    def over(micro: int, variant: str, other: str) -> list[float]:
        pairs = zip(rows(micro, variant), rows(micro, other), strict=True)
        return [a["images_per_s"] / b["images_per_s"] for a, b in pairs]

    lines = []
    for micro in (128, 32, 8):
        speeds = [
            list_of("{:,.0f}", (row["images_per_s"] for row in rows(micro, name)))
            for name in ("before", "now", "graphs", "stock")
        ]
        pairs = ("now", "before"), ("graphs", "before"), ("graphs", "stock")
        ratios = [list_of("{:.2f}", over(micro, *pair)) for pair in pairs]
        memory = [
            say("{:.1f}", max(row["mb_per_image"] for row in rows(micro, name)))
            for name in ("before", "now", "graphs", "stock")
        ]
        lines.append([str(micro), *speeds, *ratios, *memory])
    speed, memory_of = "images/s before | now | graphs | stock", "MB an image before | now | graphs | stock"
    ratio = "now ÷ before | graphs ÷ before | graphs ÷ stock"
    yield table(f"| micro-batch | {speed} | {ratio} | {memory_of} |", lines)
    yield setting("1.35, 1.6 and 2 times *before* with micro-batches of 128, 32 and 8", "targets")
    yield setting("180 MB an image at 128", "a target")
    for micro, target in ((128, 1.35), (32, 1.6), (8, 2)):
        assert [ratio >= target for ratio in over(micro, "graphs", "before")] == [micro != 128, True, True]
    assert rows(128, "graphs")[0]["ms"][0] > 10 * rows(128, "graphs")[0]["ms"][1]
    yield setting("all rounds but one: in the first round of 128", "asserted above")
    busy = [found["profiles"][f"{name} 128"]["busy_ms"] for name in ("now", "before")]
    yield sentence("the GPU is busy for {:.0f} ms in place of {:.0f} ms at 128", *busy)
    yield sentence("allows a ratio of {:.2f} where", busy[1] / busy[0])
    medians = [statistics.median(over(micro, "now", "before")) for micro in (128, 32, 8)]
    yield sentence("the median of the three rounds is {:.2f}", medians[0])
    yield sentence("is what is waited for: {:.2f} at 32, and {:.2f} at 8", *medians[1:])
    beside = over(8, "now", "stock")
    yield sentence("There, at 8, stock is faster ({:.2f} to {:.2f} times its speed)", min(beside), max(beside))
    memory = [max(row["mb_per_image"] for row in rows(8, name)) for name in ("stock", "graphs")]
    assert max(beside) < 1
    assert memory[0] < memory[1]
    (row,) = (row for row in result("limits_h200")["ours-s"] if row["limit_gib"] == 24)
    yield sentence("the first plan of S keeps {:.2f} of the bytes, in {:.3f} times the time", *row["ladder"][1])
    bytes_mb = rows(128, "now")[0]["mb_per_image"]
    yield sentence("*Before* needed {:.0f} MB", rows(128, "before")[0]["mb_per_image"])
    yield sentence("An image takes {:.0f} MB, {:.0f} % more than the target", bytes_mb, 100 * (bytes_mb / 180 - 1))
    profile = found["profiles"]["now 32"]
    ms = statistics.median(each for row in rows(32, "now") for each in row["ms"])
    yield sentence(
        "the host launches {:,} kernels in a step with micro-batches of 32, in which the GPU is busy for {:.0f} ms "
        "of about {:.0f} ms (median)",
        *(profile["launches"], profile["busy_ms"], round(ms, -1)),
    )
    yield _kernels()
    longest = {micro: [_longest(f"{name} {micro}") for name in ("before", "now")] for micro in (128, 32)}
    yield sentence(
        "At 128, the output went from {:.1f} to {:.1f} ms, the sums for the gradient from {:.1f} to {:.1f} ms, the "
        "gradient from {:.1f} to {:.1f} ms, and the statistics from {:.1f} to {:.1f} ms",
        *(each[name] for name in ("normalize", "gradient_sums", "gradient", "statistics") for each in longest[128]),
    )
    yield sentence(
        "At 32, the sums for the gradient went from {:.1f} to {:.1f} ms",
        *(each["gradient_sums"] for each in longest[32]),
    )
    assert longest[128][0]["gradient_sums"] > longest[128][1]["gradient_sums"]
    yield setting("although they fell at 128", "asserted above")
    yield setting("(relative difference at most 5e-5, 3e-3 and 3e-2)", "the bounds of a test")


def _rows(part: dict[str, Any], micro: int, variant: str) -> list[dict[str, Any]]:
    return [row for row in part["rows"] if (row["micro_batch"], row["variant"]) == (micro, variant)]


def _longest(profile: str) -> dict[str, float]:
    """Return the milliseconds of kernels in a profile; some names began with an underscore before."""
    found: dict[str, float] = result("step")["profiles"][profile]["longest_ms"]
    return {name.removeprefix("_"): ms for name, ms in found.items()}


def _kernels() -> Passage:
    runs = [result("step")["profiles"][name] for name in ("before 128", "now 128", "before 32", "now 32")]
    # Row → the kinds that it adds up.
    kinds = {
        "BatchNorm and SiLU": ["BatchNorm"],
        "images from bytes": ["image"],
        "nearest upsampling": ["upsampling"],
        "copies, casts, and the batch from the host": ["copy"],
        "concatenations": ["concatenation"],
        "convolutions": ["convolution"],
        "attention": ["attention"],
        "loss": ["loss"],
        "additions and others": ["elementwise", "reduction", "other"],
    }
    lines = []
    for name, added in kinds.items():
        sums = [sum(run["kinds_ms"].get(kind, 0.0) for kind in added) for run in runs]
        lines.append([name, *(say("{:.1f}", ms) if ms else "(in others)" for ms in sums)])
    lines.append(["sum", *(say("{:.1f}", run["busy_ms"]) for run in runs)])
    return table("| kernels | 128, before | 128, now | 32, before | 32, now |", lines)


@measured("Not measured")
def not_measured() -> Iterator[Passage]:
    """Yield the numbers of the list of what was not measured, which are no figures."""
    yield setting("(torch 2.3.1 or 2.15.0, flash-attn 2.7.4.post1)", "versions")
    yield setting("All tests pass with 2.3.1 on the CPU; the last whole run with 2.15 was made", "versions")
    yield setting("In 2.3.1 and 2.11, the operators", "versions")
    yield setting("compute capability below 8.0", "a product's limit")
    yield setting("another version of PyTorch than 2.11", "versions")
    yield setting("turbo and v1.0", "names")
