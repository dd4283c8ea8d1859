"""Files of runs, as a training writes them, for tests of the monitor."""

import json
import os

from yolov12.mas.journal.columns import COLUMNS

NAMES = [column.name for column in COLUMNS]
HEADER = ",".join(NAMES) + "\n"
NEWER = "data_wait_ms,decode_ms,augment_ms,period_ms,power_w,temperature_c,replayed,"
"""Columns that files of earlier versions do not have."""


def line(step, events="", *, size=64, peak=900, budget=1000, images=64):
    """Return a line of memory.csv; `size` is the largest micro-batch."""
    parts = " ".join(str(min(size, images - start)) for start in range(0, images, size))
    values = [
        step,
        1 + step // 50,
        images,
        parts,
        "",
        "640x640",
        9,
        peak,
        peak,
        peak,
        100,
        budget,
        500.0,
        128.0,
        *[""] * 6,
        0,
        events,
    ]
    return ",".join(map(str, values)) + "\n"


def rows(*lines):
    return [dict(zip(NAMES, each.rstrip("\n").split(","), strict=True)) for each in lines]


def write(folder, *lines, name="memory.csv"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(HEADER + "".join(lines))
    return folder


def end(folder, made=3, expected=3):
    (folder / "memory.json").write_text(json.dumps({"updates": made, "updates_expected": expected}))


def arguments(folder, mas="true"):
    """Write the arguments of a training, as Ultralytics does when it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.yaml").write_text(f"task: detect\n{f'mas: {mas}' if mas else 'nms: true'}\nmode: train\n")
    return folder


def old(folder):
    for path in (*folder.iterdir(), folder):
        os.utime(path, (0, 0))
    return folder
