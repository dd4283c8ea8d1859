"""Loaders by worker, by their number and by device in docs/reference/measurements.md and docs/explanation/data.md."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from statistics import median

from scripts.figures.measured_steps import HOW, measured
from scripts.figures.pages import Passage, result, say, section, sentence, setting, table

SOURCES = {"files": "JPEG files", "ram": "`cache=ram`"}


@measured("From the workers to the training process")
def workers() -> Iterator[Passage]:
    """Yield the passages on batches on their way to the training process."""
    found = result("loader_workers")["rows"]
    keys = ("worker_user_ms", "worker_system_ms", "main_ms")
    yield setting("two workers, batches of 16 images", HOW)
    lines = []
    for source, words in SOURCES.items():
        names = {
            "stock, 2 workers": "Ultralytics",
            "ours, 2 workers, new memory": "new memory",
            "ours, 2 workers": "this package",
        }
        for name, who in names.items():
            rows = [row for row in found if (row["source"], row["setting"]) == (source, name)]
            ms = [median(row[key] for row in rows) for key in keys]
            faults = say("{:.0f}", median(row["faults_per_image"] for row in rows))
            lines.append([f"{words}: {who}", *(say("{:.2f}", each) for each in (*ms, sum(ms))), faults])
    yield table(
        "| | worker, user | worker, system | training process | together | page faults of the worker for an image |",
        lines,
    )
    yield setting("An image of 640 pixels fills 300 pages of 4 KiB", "computed: 3 × 640 × 640 bytes")


@measured("Number of loader workers")
def numbers() -> Iterator[Passage]:
    """Yield the passages on loaders by number of workers."""
    found = result("workers")
    rows, processes = found["loaders"]["rows"], found["processes"]["rows"]
    assert found["processes"]["machine"]["siblings of core 0"] == "0"
    yield setting("NVIDIA H200 with 16 cores", "the machine")
    yield setting("batches of 64 images of 640 pixels, from 1,024 JPEG files", HOW)
    seconds = [row["seconds"] for row in rows]
    yield sentence("one measurement of {:.1f} to {:.1f} s", min(seconds), max(seconds))
    yield setting("files with 8 workers could come again", HOW)
    lines = []
    for row in sorted(rows, key=lambda row: (row["source"], row["workers"])):
        ms = [say("{:.2f}", row[f"{key}_ms"]) for key in ("worker_user", "worker_system", "worker_runqueue", "main")]
        idle = say("{:.0f} %", max(row["idle_percent"], 0.0))  # CPU time is counted in steps of 10 ms
        name = f"{SOURCES[row['source']]}, {row['workers']} workers"
        lines.append([name, say("{:,.0f}", row["images_per_s"]), *ms, idle])
    yield table("| | images/s | worker, user | worker, system | worker, run queue | training process | idle |", lines)
    one, every = processes[0], processes[-1]
    yield sentence(
        "{} processes at once do {:.1f} times the work of one", every["processes"], every["compute"] / one["compute"]
    )
    yield sentence("They copy {:.0f} GiB/s (one: {:.0f})", every["copy"], one["copy"])
    yield sentence("write {:.1f} GiB/s on new pages of shared memory (one: {:.1f})", every["faults"], one["faults"])
    files, ram = (functools.partial(speeds, source) for source in ("files", "ram"))
    yield sentence(
        "From files, 15 workers load {:.2f} to {:.2f} times as many images a second as 8, "
        "and 16 load {:.2f} times as many",
        *(min(files(15)) / max(files(8)), max(files(15)) / min(files(8)), files(16)[0] / files(8)[0]),
    )
    yield sentence(
        "From memory, 15 workers load {:.2f} to {:.2f} times as many as 8",
        *(min(ram(15)) / max(ram(8)), max(ram(15)) / min(ram(8))),
    )
    yield sentence("idle for at most {:.0f} % of the time", max(row["idle_percent"] for row in rows))
    yield sentence("time for an image is at most {:.2f} ms", max(row["worker_system_ms"] for row in rows))
    fewer = [row["worker_runqueue_ms"] for row in rows if row["workers"] < 16]
    all_cores = [row["worker_runqueue_ms"] for row in rows if row["workers"] == 16]
    yield sentence(
        "Up to 15 workers, a worker waits for a core for at most {:.2f} ms an image; "
        "with 16 workers, {:.2f} to {:.2f} ms",
        *(max(fewer), min(all_cores), max(all_cores)),
    )
    pairs = [of(number) for of in (files, ram) for number in (8, 15)]
    yield sentence("differ by up to {:.0f} %", 100 * max(max(pair) / min(pair) - 1 for pair in pairs))
    yield setting("Files with 12 workers are such a slow row", "a row of the table")
    yield setting("from 8 up to one less than the cores: here it would try 12, then 15", "what the choice tries")
    yield setting("slower with 15 workers than with 8", "its file was not kept")


def speeds(source: str, workers: int) -> list[float]:
    """Return images/s of each measurement of a number of workers.

    Args:
        source: Where images come from, `files` or `ram`.
        workers: Number of workers.
    """
    rows = result("workers")["loaders"]["rows"]
    return [row["images_per_s"] for row in rows if (row["source"], row["workers"]) == (source, workers)]


@measured("Augmentation on the device: the work of the host")
def augmentation() -> Iterator[Passage]:
    """Yield the passages on augmentation on the device."""
    found = result("augmentation")
    yield setting("a batch of 16 is complete on the host", HOW)
    yield setting("the median of 20 pairs of batches", HOW)
    lines = []
    for source, words in (("ram", "`cache=ram`, mosaic"), ("files", "JPEG files, mosaic")):
        row = found["cpu"][source]
        lines.append([words, *(say("{:.2f}", row[key]) for key in ("host_cpu_ms", "device_cpu_ms", "ratio"))])
    yield table("| | `augment_on=host` | `augment_on=device` | ratio |", lines)


@measured("Decoding JPEG files")
def decoding() -> Iterator[Passage]:
    """Yield the passages on decoders."""
    found = result("decoding")
    speeds_ = {name: median(each) for name, each in found["images_per_s"].items()}
    yield sentence("on {} cores and one", found["cores"])
    yield sentence("{:,} drawn images", found["images"])
    yield sentence("JPEG files of {:.0f} kB", found["mean_bytes"] / 1e3)
    yield setting("decoded five", HOW)
    names = {
        "opencv": "OpenCV, one thread",
        "opencv, all cores": "OpenCV, a process on each core",
        "torchvision": "torchvision, one thread",
        "nvjpeg": "nvJPEG",
    }
    lines = []
    for key, name in names.items():
        off = found["difference"].get(key)
        differs = [say("{:.0f} %", off["percent_beyond_2"]), say("{:.1f}", off["mean"])] if off else ["", ""]
        lines.append([name, say("{:,.0f}", speeds_[key]), *differs])
    differences = "values that differ from OpenCV's by more than 2 | mean difference, of 255"
    yield table(f"| | images/s, median | {differences} |", lines)
    ratio = speeds_["nvjpeg"] / speeds_["opencv, all cores"]
    yield sentence("nvJPEG decodes {:.1f} times as many images a second as all cores", ratio)


@section("docs/explanation/data.md", "Pixels on the device", is_whole=False)
def packed() -> Iterator[Passage]:
    """Yield the size of packed images."""
    ratios = {row["model"]: row["ratio"] for row in result("training")["ratios"]}
    yield sentence(
        "first epoch, were {:.1f} and {:.1f} times as fast as Ultralytics' from the second", ratios["n"], ratios["s"]
    )
