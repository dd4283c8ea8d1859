"""Ratios of the regression guard, and their comparison with the committed ones.

A ratio says how many times as good this package is as stock Ultralytics: more is better. Times, bytes and kernels are
stock's divided by ours. Its value is the median over rounds. Two measurements count as equal up to a tolerance, the sum
of two fractions: the margin of the ratio, by which whole runs differ, and the mean of both ranges over rounds. For five
rounds, this range is about three standard errors of the difference of the medians. The tolerance is at most
`MOST_TOLERANCE`, so that noise can hide no larger loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MOST_TOLERANCE", "VERDICTS", "Comparison", "Ratio", "compare", "reference_for", "table"]

MOST_TOLERANCE = 0.15
VERDICTS = ("WORSE", "better", "same", "no reference")


@dataclass(frozen=True)
class Ratio:
    """How many times as good this package is as stock, in each round."""

    rounds: Sequence[float]
    """Quotients of the two sides of a round."""
    margin: float
    """Fraction by which runs differ although their rounds agree."""
    is_portable: bool = False
    """True if the ratio is the same on other devices of its kind."""

    @property
    def median(self) -> float:
        """Median over rounds."""
        return statistics.median(self.rounds)

    @property
    def range(self) -> float:
        """Largest minus least round, as a fraction of the median."""
        return (max(self.rounds) - min(self.rounds)) / self.median


@dataclass(frozen=True)
class Comparison:
    """A ratio beside the committed one."""

    name: str
    before: Ratio | None
    """None if there is nothing to compare with."""
    now: Ratio

    @property
    def tolerance(self) -> float:
        """Fraction up to which the two count as equal; 0 without a committed ratio."""
        if self.before is None:
            return 0.0
        return min(MOST_TOLERANCE, self.now.margin + (self.before.range + self.now.range) / 2)

    @property
    def allowed(self) -> float:
        """Least value that is not worse; 0 without a committed ratio."""
        return 0.0 if self.before is None else self.before.median * (1 - self.tolerance)

    @property
    def is_worse(self) -> bool:
        """True if the ratio is below what is allowed."""
        return self.now.median < self.allowed

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.before is None:
            return "no reference"
        if self.is_worse:
            return "WORSE"
        return "better" if self.now.median > self.before.median * (1 + self.tolerance) else "same"


def reference_for(committed: Mapping[str, Any], device: str, is_gpu: bool) -> tuple[str | None, dict[str, Ratio]]:
    """Return the device whose ratios are compared, and these ratios; None and nothing if there are none.

    Another device of the same kind (GPU, CPU) stands in for one that was never measured, with its portable ratios.

    Args:
        committed: Content of a JSON file of `benchmarks/guard.py`.
        device: Name of the device.
        is_gpu: True for a GPU.
    """
    heads: Mapping[str, Any] = committed.get("measured_on", {})
    alike = [name for name, head in heads.items() if (head["gpus"] > 0) is is_gpu]
    for name in sorted(alike, key=lambda name: (name != device, name)):
        ratios = {key: Ratio(**each) for key, each in committed[name].items()}
        if name != device:
            ratios = {key: each for key, each in ratios.items() if each.is_portable}
        if ratios:
            return name, ratios
    return None, {}


def compare(reference: Mapping[str, Ratio], found: Mapping[str, Ratio]) -> list[Comparison]:
    """Compare what was measured with the reference, in the order in which it was measured."""
    return [Comparison(name, reference.get(name), now) for name, now in found.items()]


def table(comparisons: Iterable[Comparison]) -> str:
    """Return a table in Markdown."""
    lines = ["| ours against stock, more is better | was | is | allowed | |", "|---|---|---|---|---|"]
    for each in comparisons:
        was, allowed = (f"{each.before.median:.3f}", f"{each.allowed:.3f}") if each.before else ("", "")
        rounds = f"{each.now.median:.3f} ({min(each.now.rounds):.3f} to {max(each.now.rounds):.3f})"
        lines.append(f"| {each.name} | {was} | {rounds} | {allowed} | {each.verdict} |")
    return "\n".join(lines)
