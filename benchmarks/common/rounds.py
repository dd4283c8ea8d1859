"""Variants that take turns, so that a drift of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(runs: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: int = 0) -> dict[str, list[T]]:
    """Run variants A B C A B C, and return the results of each.

    Args:
        runs: Name of a variant → how it runs once.
        rounds: Number of rounds that count.
        warm_up: Number of rounds before them, whose results are dropped.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name, run in runs.items():
            result = run()
            if number >= warm_up:
                found[name].append(result)
    return found


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the quotients of the values of the same rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def median_ms(run: Callable[[], object], steps: int) -> float:
    """Return the median time of a call in milliseconds, with all work of the GPU if there is one."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = []
    for _ in range(steps):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
