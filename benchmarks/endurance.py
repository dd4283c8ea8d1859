"""Endurance: allocations that fail anywhere in a step, two hours beside another process, and a hundred kills.

    python -m benchmarks endurance --out benchmarks/results/endurance.json --device cpu   (ten minutes on two cores)
    python -m benchmarks endurance --out endurance_gpu.json --only failures --seconds 300      (one GPU)
    python -m benchmarks endurance --out endurance_gpu.json --only neighbour --seconds 240     (one GPU)
    python -m benchmarks endurance --out part.json --small --device cpu                        (a minute, to try it)

Part `failures`: allocations fail at drawn places, one or two in a step: in warm-ups, copies, forward and
backward passes, the loss, between micro-batches and in the first update. Ours runs steps of the engine in float64,
whose weights are compared with those of the same steps without failures, and whole trainings with Ultralytics' trainer.
`injected` is what the benchmark made fail and `counted` what the summaries of the runs count. Stock's trainings have
one failure each, in their second epoch. Stock is Ultralytics in a process in which this package is not joined to it.

Part `neighbour`: another process holds a drawn part of the memory, another one every 1 to 5 s. On the CPU the device is
simulated, the process holds up to 70 % of it, and two hours pass on the device's clock. On a GPU it holds up to 40 %,
and makes the changes of two hours in the time of our training. Stock meets them at the same rate, in a third of it.

Part `kills`: trainings are killed (SIGKILL) at drawn moments, also while they start, and resumed until they end. Ours
has `save_every=1 resume=auto`; stock's is resumed from its last.pt. Always on the CPU.

The file is written after each piece, and keeps the parts that it has.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import report
from benchmarks.endurance_failures import failures
from benchmarks.endurance_kills import kills
from benchmarks.endurance_neighbour import HOURS, neighbour

Pieces = Iterator[dict[str, Any]]


def main() -> int:
    """Run the parts, and write what is known after each piece of them."""
    parser = report.parser(__doc__, parts=("failures", "neighbour", "kills"), small="a few of everything")
    parser.add_argument("--seconds", type=float, default=900.0, help="time for all parts together")
    parser.add_argument("--failures", type=int, default=10_000, help="failures to inject")
    parser.add_argument("--processes", type=int, default=1, help="processes at the same time, but for `neighbour`")
    parser.add_argument("--seed", type=int, default=0, help="of the failures: another one draws others")
    parser.add_argument("--kills", type=int, default=100, help="kills of our trainings")
    options = parser.parse_args()
    os.environ.setdefault("YOLO_OFFLINE", "1")
    device, small = options.device, options.small
    wanted, killed, stock = (12, 2, 1) if small else (options.failures, options.kills, 20 if device == "cpu" else 6)
    parts: dict[str, Callable[[float], Pieces]] = {
        "failures": lambda left: failures(device, left, wanted, stock, options.processes, options.seed),
        "neighbour": lambda left: neighbour(device, left, HOURS / 100 if small else HOURS),
        "kills": lambda left: kills(left, killed, min(killed, 30), options.processes),
    }
    result = report.Report(options.out, device, keep=True)
    end = time.monotonic() + options.seconds
    for number, part in enumerate(options.only):
        begun = time.monotonic()
        left = (end - begun) / (len(options.only) - number)
        for found in parts[part](left):
            result.add(part, found)
        print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
