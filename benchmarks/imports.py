"""CPU seconds of `from ultralytics import YOLO`, with this package and without it (YOLOV12_AUTOPATCH=0).

    python benchmarks/imports.py --out benchmarks/results/imports.json          (about two minutes, no GPU)

Each import runs in a process of its own, user and system time together, in turns: stock, ours, stock, ours. One of each
goes first and does not count, as it may compile bytecode. On a machine with other work, minima tell more than medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

CODE = "from ultralytics import YOLO"
VARIANTS = {"stock": {"YOLOV12_AUTOPATCH": "0"}, "ours": {"YOLOV12_AUTOPATCH": "1"}}


def run(code: str, variant: str) -> str:
    """Output of a process."""
    environment = {**os.environ, **VARIANTS[variant]}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def cpu_s(variant: str) -> float:
    """CPU seconds of one process that imports Ultralytics."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(CODE, variant)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def modules(variant: str) -> list[str]:
    """Modules that are loaded after the import."""
    return run(f"{CODE}\nimport sys\nprint(*sorted(sys.modules))", variant).splitlines()[-1].split()


def measure(rounds: int) -> dict[str, Any]:
    """Times of both variants, and what the package loads."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name in VARIANTS:
            seconds = cpu_s(name)
            if turn:
                times[name].append(round(seconds, 3))
    median, least = ({name: kind(each) for name, each in times.items()} for kind in (statistics.median, min))
    loaded = {name: modules(name) for name in VARIANTS}
    return {
        "code": CODE,
        "cpu_s": times,
        "median_cpu_s": median,
        "least_cpu_s": least,
        "ours_over_stock": {
            "median": round(median["ours"] / median["stock"], 3),
            "least": round(least["ours"] / least["stock"], 3),
        },
        "modules": {name: len(each) for name, each in loaded.items()},
        "modules_of_ours": [name for name in loaded["ours"] if name.partition(".")[0] == "yolov12"],
        "modules_beside_ours": sorted(
            {each.partition(".")[0] for each in {*loaded["ours"]} - {*loaded["stock"]}} - {"yolov12"}
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    found = {
        "command": f"python benchmarks/imports.py --out {options.out.name} --rounds {options.rounds}",
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ultralytics": version("ultralytics"),
        **measure(options.rounds),
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for name in VARIANTS:
        print(f"{name}: median {found['median_cpu_s'][name]:.2f} s, least {found['least_cpu_s'][name]:.2f} s")
    print(f"ours over stock: {found['ours_over_stock']}")


if __name__ == "__main__":
    main()
