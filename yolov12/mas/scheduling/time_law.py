"""The law of a card's speed: milliseconds of a micro-batch by its pixels, from a few sizes that were measured.

    ms = max(host, device · pixels)

A fast card waits for the host while a micro-batch is small, so its time is flat, then rises in proportion. Such a law
is convex, so times that were measured bound the others from below: a larger micro-batch takes at least as long, and
goes on as steeply as before; a smaller one takes at least its share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from yolov12.mas.scheduling.peak_law import Size

__all__ = ["SpeedLaw", "megapixels"]

_APART = 1.5  # sizes that differ by less would make of the slope between them a noise


@dataclass(frozen=True)
class SpeedLaw:
    """At level 0."""

    points: tuple[tuple[float, float], ...] = ()
    """Megapixels and ms of what was measured, by megapixels."""
    host_ms: float = 0.0
    device_ms: float = 0.0
    """Of a megapixel."""
    profiled: bool = False

    @classmethod
    def fit(cls, points: Iterable[tuple[float, float]], prior_ms: tuple[float, float] | None) -> SpeedLaw:
        """Find host and device whose maximum is nearest to the points.

        Where one side was not measured, it is taken to be as slow as the points allow.

        Args:
            points: Megapixels and ms.
            prior_ms: Of host and device, from a profile: their ratio counts where the points leave it open.
        """
        measured = tuple(sorted(points))
        if not measured:
            return cls((), *(prior_ms or (0.0, 0.0)), profiled=prior_ms is not None)
        fitted = list(measured)
        if prior_ms is not None:  # two points far out, on the height of what was measured
            host, device = prior_ms
            off = sum(math.log(ms / max(host, device * pixels)) for pixels, ms in measured) / len(measured)
            far = [near * host / device for near in (1e-2, 1e2)]
            fitted = sorted(fitted + [(pixels, math.exp(off) * max(host, device * pixels)) for pixels in far])
        best, line = math.inf, (0.0, 0.0)
        for hosts in range(len(fitted) + 1):  # so many wait for the host
            host = _mean_log([ms for _, ms in fitted[:hosts]] or [fitted[0][1]])
            device = _mean_log([ms / pixels for pixels, ms in fitted[hosts:]] or [fitted[-1][1] / fitted[-1][0]])
            error = sum(math.log(max(host, device * pixels) / ms) ** 2 for pixels, ms in fitted)
            if error < best - 1e-12:
                best, line = error, (host, device)
        return cls(measured, *line, profiled=prior_ms is not None)

    def bounds_ms(self, pixels: float) -> tuple[float, float]:
        """Expected and least time of so many megapixels."""
        if not self.points and not self.profiled:
            return pixels + 1.0, pixels + 1.0  # of equals, the fewest micro-batches
        expected = max(self.host_ms, self.device_ms * pixels)
        if self.profiled:
            return expected, expected
        below = [point for point in self.points if point[0] <= pixels]
        least = [ms for _, ms in below] + [ms * pixels / there for there, ms in self.points if there > pixels]
        if below:
            last_pixels, last_ms = below[-1]
            for there, ms in below:
                if there * _APART <= last_pixels:
                    slope = max(last_ms - ms, 0.0) / (last_pixels - there)
                    least.append(last_ms + slope * (pixels - last_pixels))
        return expected, min(max(least), expected)


def megapixels(size: Size) -> float:
    """Of a micro-batch."""
    return size[0] * size[1] * size[2] / 1e6


def _mean_log(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
