"""Kernels, exact tasks and imports in docs/reference/measurements.md."""

from __future__ import annotations

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
    yield setting("*Before* is commit 43d3971", HOW)
    yield setting("*Now* is commit 8810290", HOW)
    yield setting("The run was ended after 260 s, so there are two rounds at 8", HOW)
    order = ("before", "now", "stock")

    def rows(micro: int, variant: str) -> list[dict[str, Any]]:
        return [row for row in found["rows"] if (row["micro_batch"], row["variant"]) == (micro, variant)]

    lines = []
    for micro in (128, 32, 8):
        speeds = [list_of("{:,.0f}", (row["images_per_s"] for row in rows(micro, name))) for name in order]
        ratios = [each for each in found["ratios"] if each["micro_batch"] == micro]
        over = [
            list_of("{:.2f}", (row["ratio"] for row in ratios if row["over"] == name)) for name in ("before", "stock")
        ]
        memory = [say("{:.1f}", rows(micro, name)[0]["mb_per_image"]) for name in order]
        lines.append([str(micro), *speeds, *over, *memory])
    speed, memory_of = "images/s before | now | stock", "MB an image before | now | stock"
    yield table(f"| micro-batch | {speed} | now ÷ before | now ÷ stock | {memory_of} |", lines)
    yield setting(
        "1.35, 1.6 and 2 times *before* with micro-batches of 128, 32 and 8, and 180 MB an image at 128", "targets"
    )
    profile = found["profiles"]["now 32"]
    ms = statistics.median(each for row in rows(32, "now") for each in row["ms"])
    yield sentence(
        "a step took about {:.0f} ms (median), in which the host launched {:,} kernels and the GPU was busy for {:.0f} "
        "ms",
        *(round(ms, -1), profile["launches"], profile["busy_ms"]),
    )
    rounds = [[row["images_per_s"] for row in rows(32, name)] for name in order]
    worst = max(1 - min(each) / max(each) for each in rounds)
    yield sentence("the rounds of one variant differ by up to {:.0f} %", 100 * worst)
    yield setting("With micro-batches of 32, a step took", HOW)
    yield setting("The processes had been profiled at 128 before", HOW)
    yield _kernels()
    pairs = {micro: [_longest(f"{name} {micro}") for name in ("before", "now")] for micro in (128, 32)}
    yield sentence(
        "At 128, the output went from {:.1f} to {:.1f} ms, the sums for the gradient from {:.1f} to {:.1f} ms, and the "
        "gradient from {:.1f} to {:.1f} ms. The statistics did not change ({:.1f} and {:.1f} ms)",
        *(each[name] for name in ("normalize", "gradient_sums", "gradient", "statistics") for each in pairs[128]),
    )
    yield sentence(
        "At 32, the sums for the gradient went from {:.1f} to {:.1f} ms", *(each["gradient_sums"] for each in pairs[32])
    )
    yield setting("This is more than at 128", HOW)
    yield setting("(relative difference at most 5e-5, 3e-3 and 3e-2)", "the bounds of a test")


def _longest(profile: str) -> dict[str, float]:
    """Return the milliseconds of kernels in a profile."""
    found: dict[str, float] = result("step")["profiles"][profile]["longest_ms"]
    return found


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
    yield setting("The step of X at 16 GiB", "a label")
    yield setting("(torch 2.3.1 or 2.15.0, flash-attn 2.7.4.post1)", "versions")
    yield setting("All tests pass with 2.3.1 on the CPU; the last whole run with 2.15 was made", "versions")
    yield setting("In 2.3.1 and 2.11, the operators", "versions")
    yield setting("compute capability below 8.0", "a product's limit")
    yield setting("turbo and v1.0", "names")
