"""Batches on their way from workers in docs/reference/measurements.md."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from scripts.figures.measured_steps import HOW, measured
from scripts.figures.pages import Passage, result, say, setting, table


@measured("From the workers to the training process")
def workers() -> Iterator[Passage]:
    """Yield the passages on batches on their way to the training process."""
    found = result("loader_workers")["rows"]
    keys = ("worker_user_ms", "worker_system_ms", "main_ms")
    yield setting("two workers, batches of 16 images", HOW)
    lines = []
    for source, words in (("files", "JPEG files"), ("ram", "`cache=ram`")):
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
