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
    yield setting("commit 97d4a28", HOW)
    order = ("before", "now", "stock")

    def rows(micro: int, variant: str) -> list[dict[str, Any]]:
        return [row for row in found["rows"] if (row["micro_batch"], row["variant"]) == (micro, variant)]

    lines = []
    for micro in (128, 32):
        speeds = {name: [row["images_per_s"] for row in rows(micro, name)] for name in order}
        over = [[a / b for a, b in zip(speeds["now"], speeds[name], strict=True)] for name in ("before", "stock")]
        memory = [say("{:.1f}", rows(micro, name)[0]["mb_per_image"]) for name in ("before", "now")]
        cells = [list_of("{:,.0f}", speeds[name]) for name in order] + [list_of("{:.2f}", each) for each in over]
        lines.append([str(micro), *cells, *memory])
    yield table(
        "| micro-batch | images/s before | now | stock | now ÷ before | now ÷ stock | MB an image before | now |", lines
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
    yield setting("predicts 208.6 and 203.7 MB an image at 128", "predicted by yolov12 plan, not measured")
    yield _kernels()
    longest = {name: found["profiles"][f"{name} 128"]["longest_ms"] for name in ("before", "now")}
    pairs = [(longest["before"][f"_{name}"], longest["now"][name]) for name in _BATCHNORM]
    yield sentence(
        "brought the gradient from {:.1f} to {:.1f} ms, the sums for it from {:.1f} to {:.1f} ms, and the output from "
        "{:.1f} to {:.1f} ms. The statistics went from {:.1f} to {:.1f} ms",
        *(ms for pair in pairs for ms in pair),
    )
    why = "counted by hand in runs of single kernels, which are not in the JSON"
    yield setting("What is missing to 40 ms", "the prediction in the table")
    yield setting("with micro-batches of 32, a kernel that computes sums takes 5 to 7 µs more", why)
    yield setting("and there are 226 of them", why)
    yield setting("gained about 1 % in a run of single kernels (not in the JSON)", why)
    yield setting("PyTorch's kernel reaches 1.8 TB/s in fp16 (the same run)", why)
    yield setting("a saving of 3 to 6 ms that had been predicted", "a prediction")


_BATCHNORM = ("gradient", "gradient_sums", "normalize", "statistics")


def _kernels() -> Passage:
    runs = [result("step")["profiles"][name] for name in ("before 128", "now 128", "before 32", "now 32")]
    # Row → what had been predicted, and the kinds that it adds up.
    kinds = {
        "BatchNorm and SiLU": ("65 → 40", ["BatchNorm"]),
        "images from bytes": ("9 → under 2", ["image"]),
        "nearest upsampling": ("10 → 3, with casts", ["upsampling"]),
        "copies, casts, and the batch from the host": ("13 + 9 + 6 less", ["copy"]),
        "concatenations": ("", ["concatenation"]),
        "convolutions": ("", ["convolution"]),
        "attention": ("", ["attention"]),
        "additions, loss and others": ("", ["elementwise", "reduction", "other"]),
    }
    lines = []
    for name, (predicted, added) in kinds.items():
        sums = [sum(run["kinds_ms"].get(kind, 0.0) for kind in added) for run in runs]
        lines.append([name, predicted, *(say("{:.1f}", ms) if ms else "(in copies)" for ms in sums)])
    lines.append(["sum", "230 → 190", *(say("{:.1f}", run["busy_ms"]) for run in runs)])
    return table("| kernels | predicted | 128, before | 128, now | 32, before | 32, now |", lines)


@measured("Not measured")
def not_measured() -> Iterator[Passage]:
    """Yield the numbers of the list of what was not measured, which are no figures."""
    yield setting("run on an H200 (58 tests)", "a run of tests, whose output was not kept")
    yield setting("(relative difference at most 5e-5, 3e-3 and 3e-2)", "the bounds of a test")
    yield setting("predicts 11 % less than was measured", "a prediction whose output was not kept")
    yield setting("YOLO12-S in micro-batches of 128)", HOW)
    yield setting("micro-batches of 8, and that of X at 16 GiB", "a label")
    yield setting("(torch 2.3.1 or 2.15.0, flash-attn 2.7.4.post1)", "versions")
    yield setting("All tests pass with 2.3.1 on the CPU; the last whole run with 2.15 was made", "versions")
    yield setting("In 2.3.1 and 2.11, the operators", "versions")
    yield setting("compute capability below 8.0", "a product's limit")
    yield setting("turbo and v1.0", "names")
