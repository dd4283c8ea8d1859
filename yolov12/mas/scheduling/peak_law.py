"""The memory law of one checkpoint plan: bytes of a micro-batch as a function of images, pixels and boxes.

    peak = c0 + images · pixels · (c1 + c2 · max(boxes − kink, 0)) + correction(images, height, width)

Usually the peak of a micro-batch is at the start of the backward pass, when all activations are kept. The assignment of
boxes to anchors can need more: its tables grow with images × anchors × the boxes of the fullest image. The peak is
therefore constant up to a number of boxes (the kink), and rises beyond it. The constants c0, c1 and c2 are a
least-squares fit of relative errors over the last observations of every size.

Libraries choose workspaces by size, and their bytes jump from size to size. A smooth function cannot describe this, so
each size also has a correction: the median of its residuals.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PeakLaw", "Size"]

Size = tuple[int, int, int]
"""Images, height and width of a micro-batch."""

# Number of kinks tried between the fewest and the most boxes observed.
_KINKS = 16
_KEPT = 16  # most observations stored per size
# The observations with most boxes stay, however old: crowded images are rare and must not come as a surprise.
_KEPT_FULLEST = 4
_SIZES = 64  # most sizes stored
# Ridge regularisation on normalised columns. If the data allow several fits, the cost is attributed to the pixels.
_RIDGE = 1e-9
# A surprising prediction causes a fit if there were this many observations, or an eighth of all, since the last fit.
_REFIT = 64
_SHOCK = 0.1  # relative error that causes a fit at once
SURPRISE = 0.01
"""Smallest relative error, or relative effect of boxes, that counts as significant."""

_Array = NDArray[np.float64]


class PeakLaw:
    """Learns from every micro-batch that runs under one plan."""

    def __init__(self) -> None:
        self.spread = 0.0
        """Relative standard deviation of the residuals."""
        self.largest = 0
        """Most images observed in a micro-batch."""
        self.sizes = 0
        """Number of different pixel counts observed. With a single one, the constant part cannot be determined."""
        self._seen: dict[Size, list[tuple[int, int]]] = {}  # (boxes, bytes), latest size last
        self._corrections: dict[Size, float] = {}  # in bytes
        self._line = (0.0, 0.0, 0.0)
        self._kink = 0.0
        self._most_boxes = 0
        self._count = self._fitted_at = 0

    def seen(self, size: Size, boxes: int = 0) -> int:
        """Return the number of observations of a size; 0 if `boxes` is larger than in all observations of all sizes."""
        return len(self._seen.get(size, ())) if boxes <= self._most_boxes else 0

    @property
    def most_boxes(self) -> int:
        """Most boxes of an image in any observation."""
        return self._most_boxes

    def distance(self, size: Size) -> float:
        """Return how far a size is from the nearest one observed: 0 if it was, 1 for twice or half of its pixels.

        It is infinite before the first observation.
        """
        pixels = math.prod(size)
        return min((abs(math.log2(math.prod(each) / pixels)) for each in self._seen), default=math.inf)

    def latest(self) -> tuple[Size, int] | None:
        """Return size and boxes of the last observation; None before the first."""
        size = next(reversed(self._seen), None)
        return (size, self._seen[size][-1][0]) if size else None

    @property
    def bytes_per_box(self) -> float:
        """Bytes per 1000 pixels and 100 boxes above the kink; 0 as long as no effect of boxes was observed."""
        return self._line[2]

    def expected_bytes(self, size: Size, boxes: int, ratio: float = 1.0, bytes_per_box: float = 0.0) -> float:
        """Return the expected bytes above the memory allocated before the micro-batch.

        Args:
            size: Size of the micro-batch.
            boxes: Boxes of the image that has most.
            ratio: Activation bytes of the plan to predict for, divided by those of the plan of this law. The tables of
                the assignment have the same size under all plans. If the other plan keeps less, the tables may
                determine the peak at fewer boxes. The result is high enough even if every box adds to the peak. If it
                keeps more, the constant part counts as activations: a fit to few sizes cannot tell them apart.
            bytes_per_box: Value of the property `bytes_per_box` that other plans have learned. It is used for boxes
                beyond the most boxes observed under this plan.
        """
        fixed, pixels, tables = _terms(size, min(boxes, self._most_boxes), self._kink)
        c0, c1, c2 = self._line
        per_box = pixels * max(c2, bytes_per_box) / 1e2
        beyond = max(boxes - self._most_boxes, 0) * per_box
        more = max(ratio, 1.0)
        rising = c1 * pixels * more + c2 * tables + beyond
        if ratio < 1.0:
            rising = min(rising, c1 * pixels * ratio + boxes * per_box)
        correction = self._corrections.get(size, 0.0)
        return c0 * fixed * more + rising + (correction if ratio == 1.0 else max(correction, 0.0))

    def observe(self, size: Size, boxes: int, needed_bytes: int) -> None:
        """Learn the bytes that a micro-batch needed above the memory allocated before it."""
        known, new_size = self.seen(size, boxes) > 0, size not in self._seen
        error = abs(self.expected_bytes(size, boxes) / needed_bytes - 1.0)
        rows = self._seen[size] = [*self._seen.pop(size, []), (boxes, needed_bytes)]
        if len(rows) > _KEPT:
            usual = sorted(most for most, _ in rows)[-_KEPT_FULLEST - 1]
            del rows[next(index for index, (most, _) in enumerate(rows) if most <= usual)]
        if len(self._seen) > _SIZES:
            oldest = next(iter(self._seen))
            del self._seen[oldest], self._corrections[oldest]
        self._most_boxes = max(self._most_boxes, boxes)
        self._count += 1
        if new_size:
            self._update_sizes()
        if known:
            self.spread = (0.95 * self.spread**2 + 0.05 * min(error, 0.5) ** 2) ** 0.5
        surprised = error > max(SURPRISE, 2 * self.spread)
        due = self._count - self._fitted_at >= min(self._count // 8, _REFIT)
        if not known or error > _SHOCK or (surprised and due):
            self._fit()
        else:
            self._corrections[size] = median(each - self._line_bytes(size, most) for most, each in rows)

    def state_dict(self) -> dict[str, Any]:
        """Return everything learned, in a form that JSON can store."""
        return {
            "seen": [[*size, [list(row) for row in rows]] for size, rows in self._seen.items()],
            "off": [[*size, correction] for size, correction in self._corrections.items()],
            "law": [*self._line, self._kink, self.spread],
            "counts": [self._most_boxes, self._count, self._fitted_at],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._seen = {
            (images, height, width): [(boxes, bytes_) for boxes, bytes_ in rows]
            for images, height, width, rows in state["seen"]
        }
        self._corrections = {(images, height, width): correction for images, height, width, correction in state["off"]}
        c0, c1, c2, self._kink, self.spread = state["law"]
        self._line = c0, c1, c2
        self._most_boxes, self._count, self._fitted_at = state["counts"]
        self._update_sizes()

    def _update_sizes(self) -> None:
        self.largest = max((size[0] for size in self._seen), default=0)
        self.sizes = len({images * height * width for images, height, width in self._seen})

    def _line_bytes(self, size: Size, boxes: int) -> float:
        return sum(a * b for a, b in zip(_terms(size, boxes, self._kink), self._line, strict=True))

    def _fit(self) -> None:
        seen = [(size, boxes, needed) for size, rows in self._seen.items() for boxes, needed in rows]
        needed = np.array([row[2] for row in seen], dtype=np.float64)
        boxes = np.array([row[1] for row in seen], dtype=np.float64)
        pixels = np.array([_terms(size, 0, 0)[1] for size, *_ in seen])
        low, high = float(boxes.min()), float(boxes.max())
        best = float("inf")
        for _ in range(2):  # first the whole range, then around the best kink
            step = (high - low) / _KINKS
            kinks = low + step * np.arange(_KINKS if step else 1)
            error, line, kink = _best_line(pixels, boxes, needed, kinks)
            if error < best:
                best, self._line, self._kink = error, line, kink
            low, high = max(low, self._kink - step), min(high, self._kink + step)
        squares = 0.0
        for size, rows in self._seen.items():
            self._corrections[size] = median(each - self._line_bytes(size, most) for most, each in rows)
            squares += sum((self.expected_bytes(size, most) / each - 1.0) ** 2 for most, each in rows)
        freedom = len(seen) - len(self._seen)  # every size has its own correction
        if freedom > 0:
            self.spread = min((squares / freedom) ** 0.5, 0.5)
        self._fitted_at = self._count


def _terms(size: Size, boxes: int, kink: float) -> tuple[float, float, float]:
    kilopixels = size[0] * size[1] * size[2] / 1e3
    return 1.0, kilopixels, kilopixels * max(boxes - kink, 0.0) / 1e2


def _best_line(
    pixels: _Array, boxes: _Array, needed: _Array, kinks: _Array
) -> tuple[float, tuple[float, float, float], float]:
    """Return the best fit: its error, its line and its kink. In a valid fit, more pixels or boxes never need less."""
    flat = np.stack([np.ones_like(pixels), pixels], axis=1) / needed[:, None]
    tables = pixels * np.maximum(boxes - kinks[:, None], 0.0) / 1e2 / needed
    terms = np.concatenate([np.broadcast_to(flat, (len(kinks), *flat.shape)), tables[:, :, None]], axis=2)
    # With a single size, the constant part is unknown and is set to zero. For more images, the prediction is then too
    # high, which is safe. For fewer, it is too low, which `SPREAD_UNSEEN` covers down to about half of the size.
    first = 1 if len(np.unique(pixels)) == 1 else 0
    best = float("inf"), (0.0, float((1.0 / flat[:, 1]).mean()), 0.0), float(kinks[0])
    for columns in (range(first, 3), range(first, 2), range(1, 2)):
        lines, errors = _least_squares(terms[:, :, columns], pixels=1 - columns.start)
        full = np.zeros((len(kinks), 3))
        full[:, columns] = lines
        errors = np.where((full[:, 1:] >= 0).all(axis=1), errors, np.inf)
        index = int(errors.argmin())
        if errors[index] < best[0] - 1e-9:
            c0, c1, c2 = full[index].tolist()
            best = float(errors[index]), (c0, c1, c2), float(kinks[index])
    return best


def _least_squares(terms: _Array, pixels: int) -> tuple[_Array, _Array]:
    """Solve several problems `terms @ line = 1` by least squares. Return the lines and the sums of squared errors.

    Args:
        terms: (problems, observations, columns).
        pixels: Index of the column of pixels.
    """
    scale = np.linalg.norm(terms, axis=1, keepdims=True)
    unit = terms / np.where(scale > 0, scale, 1.0)
    ridge = np.full(terms.shape[2], _RIDGE)
    ridge[pixels] = _RIDGE * 1e-3
    squares = np.einsum("kna,knb->kab", unit, unit) + np.diag(ridge)
    solution = np.linalg.solve(squares, unit.sum(axis=1)[:, :, None])[:, :, 0]
    errors = ((np.einsum("kna,ka->kn", unit, solution) - 1.0) ** 2).sum(axis=1)
    return solution / np.where(scale > 0, scale, 1.0)[:, 0, :], errors
