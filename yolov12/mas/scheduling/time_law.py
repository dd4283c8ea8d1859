"""The speed law of a card: milliseconds of a micro-batch as a function of its pixels, from a few measured sizes.

    ms = max(host, device · pixels)

On a fast card small micro-batches are launch-bound: their time is constant, and from some size on it is proportional to
the pixels. This function is convex, so measured times are lower bounds for other sizes. A larger micro-batch takes at
least as long as a smaller one, and its time goes on to rise at least as steeply. A smaller micro-batch takes at least
its proportional part of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from yolov12.mas.scheduling.peak_law import Size

__all__ = ["SpeedLaw", "megapixels"]

# Least ratio of two sizes for a slope. Between closer sizes the slope would be noise.
_APART = 1.5


@dataclass(frozen=True)
class SpeedLaw:
    """Milliseconds at level 0 as a function of megapixels."""

    points: tuple[tuple[float, float], ...] = ()
    """(megapixels, milliseconds) of the measured sizes, sorted."""
    host_ms: float = 0.0
    """Milliseconds of a launch-bound micro-batch."""
    device_ms: float = 0.0
    """Milliseconds per megapixel of a larger micro-batch."""
    profiled: bool = False
    """True if times from a profile were used."""

    @classmethod
    def fit(cls, points: Iterable[tuple[float, float]], prior_ms: tuple[float, float] | None) -> SpeedLaw:
        """Find the host and device times whose maximum is closest to the points.

        If only one of the two was measured, the other is assumed to be as slow as the points allow.

        Args:
            points: (megapixels, milliseconds) of measured sizes.
            prior_ms: Host and device times from a profile. Their ratio counts where the points do not determine it.
        """
        measured = tuple(sorted(points))
        if not measured:
            return cls((), *(prior_ms or (0.0, 0.0)), profiled=prior_ms is not None)
        fitted = list(measured)
        if prior_ms is not None:  # two distant points, scaled to the measured times
            host, device = prior_ms
            off = sum(math.log(ms / max(host, device * pixels)) for pixels, ms in measured) / len(measured)
            far = [near * host / device for near in (1e-2, 1e2)]
            fitted = sorted(fitted + [(pixels, math.exp(off) * max(host, device * pixels)) for pixels in far])
        best, line = math.inf, (0.0, 0.0)
        for hosts in range(len(fitted) + 1):  # this many points are launch-bound
            host = _mean_log([ms for _, ms in fitted[:hosts]] or [fitted[0][1]])
            device = _mean_log([ms / pixels for pixels, ms in fitted[hosts:]] or [fitted[-1][1] / fitted[-1][0]])
            error = sum(math.log(max(host, device * pixels) / ms) ** 2 for pixels, ms in fitted)
            if error < best - 1e-12:
                best, line = error, (host, device)
        return cls(measured, *line, profiled=prior_ms is not None)

    def bounds_ms(self, pixels: float) -> tuple[float, float]:
        """Return the expected and the least milliseconds for a number of megapixels."""
        if not self.points and not self.profiled:
            return pixels + 1.0, pixels + 1.0  # then the fewest micro-batches win
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

    def device_least_ms(self, pixels: float) -> float:
        """Return the least milliseconds of the device for a number of megapixels, however fast kernels are launched.

        It is 0 as long as launches may have been the bottleneck for all measured sizes.
        """
        if self.profiled:
            return self.device_ms * pixels
        slopes = [
            (more_ms - ms) / (more - there)
            for there, ms in self.points
            for more, more_ms in self.points
            if there * _APART <= more
        ]
        return max([0.0, *slopes]) * pixels


def megapixels(size: Size) -> float:
    """Return the megapixels of a micro-batch."""
    return size[0] * size[1] * size[2] / 1e6


def _mean_log(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
