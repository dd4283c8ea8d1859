"""Our controller and its rivals on 10,000 simulated traces of memory, against an oracle that knows the future.

    python -m benchmarks controller --out benchmarks/results/controller.json      (no GPU; minutes on 2 cores)

A run is a training through 50 traces of all kinds in turn: 3000 batches, 18 minutes on the fast card. A controller
keeps what it learned in earlier traces. The first trace of each run, which begins without knowledge, is also reported
separately.
"""

from __future__ import annotations

import multiprocessing
import sys
import time

from benchmarks.common import report
from benchmarks.controller.rivals import POLICIES
from benchmarks.controller.tournament import Score, compare, summed

TRACES_PER_RUN, STEPS = 50, 60


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    began = time.monotonic()
    runs = [(seed, TRACES_PER_RUN, STEPS) for seed in range(arguments.traces // TRACES_PER_RUN)]
    scores: list[Score] = []
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for index, found in enumerate(pool.imap(_compare, runs)):
            scores += found
            print(f"\r{(index + 1) * TRACES_PER_RUN} traces", end="", file=sys.stderr)
    policies = {name: summed([score for score in scores if score.policy == name]) for name in POLICIES}
    report.Report(
        arguments.out,
        "cpu",
        traces=arguments.traces,
        steps=arguments.traces * STEPS,
        seconds=round(time.monotonic() - began),
        policies=policies,
    ).write()


def _compare(run: tuple[int, int, int]) -> list[Score]:
    return compare(*run)


if __name__ == "__main__":
    main()
