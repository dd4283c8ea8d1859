"""CPU seconds of `from ultralytics import YOLO`, with this package and without it (YOLOV12_AUTOPATCH=0).

    python -m benchmarks imports --out benchmarks/results/imports.json          (about two minutes, no GPU)

Each import runs in a process of its own, user and system time together, in turns: stock, ours, stock, ours. One of each
goes first and does not count, as it may compile bytecode. On a machine with other work, minima tell more than medians.
"""

from __future__ import annotations

import functools
import platform
import resource
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.common import report
from benchmarks.common.processes import environment
from benchmarks.common.rounds import in_turn

CODE = "from ultralytics import YOLO"
VARIANTS = ("stock", "ours")


def run(code: str, variant: str) -> str:
    """Output of a process."""
    hook = environment(variant == "stock", **({"YOLOV12_AUTOPATCH": "1"} if variant == "ours" else {}))
    return subprocess.run([sys.executable, "-c", code], env=hook, check=True, capture_output=True, text=True).stdout


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
    runs = {name: functools.partial(cpu_s, name) for name in VARIANTS}
    times = {name: [round(each, 3) for each in found] for name, found in in_turn(runs, rounds, warm_up=1).items()}
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
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    processor = platform.processor() or platform.machine()
    found = report.Report(options.out, "cpu", processor=processor, **measure(options.rounds))
    found.write()
    for name in VARIANTS:
        print(f"{name}: median {found['median_cpu_s'][name]:.2f} s, least {found['least_cpu_s'][name]:.2f} s")
    print(f"ours over stock: {found['ours_over_stock']}")


if __name__ == "__main__":
    main()
