"""The law of one checkpoint plan: bytes of a micro-batch by images, pixels and boxes, from what was observed.

    peak = c0 + images · pixels · (c1 + c2 · max(boxes − kink, 0)) + what this very shape was seen to add to that

A micro-batch has its peak where all activations are kept and the backward pass begins, unless the matching of boxes to
anchors, whose tables grow with images × anchors × boxes of the fullest image, needs more than that: a flat part and a
rising one. The constants are least squares of relative errors over the last observations of every shape. Libraries
choose workspaces by shape, in steps that no line follows, so each shape also keeps what it was off by.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PeakLaw", "Size"]

Size = tuple[int, int, int]
"""Images, height, width."""

_KINKS = 16
_KEPT = 16  # observations of one size
_KEPT_FULLEST = 4  # of these, however old: crowds are rare, and to forget them would be to meet them again
_SIZES = 64
_RIDGE = 1e-9  # of unit columns: where the data leave a choice, the cost is put on the pixels
_REFIT = 64  # at most so many observations go by before a surprise makes a new fit
_SHOCK = 0.1  # relative error that makes one at once
SURPRISE = 0.01
"""Relative error of a prediction that the law has to explain."""

_Array = NDArray[np.float64]


class PeakLaw:
    """Learns from every micro-batch that ran under one plan."""

    def __init__(self) -> None:
        self.spread = 0.0
        """Relative standard deviation of what the law leaves."""
        self.largest = 0
        """Most images a micro-batch was observed with."""
        self.sizes = 0
        """How many different numbers of pixels were observed: one says nothing about what is fixed."""
        self._seen: dict[Size, list[tuple[int, int]]] = {}  # (boxes, bytes), the size used last at the end
        self._off: dict[Size, float] = {}  # bytes
        self._line = (0.0, 0.0, 0.0)
        self._kink = 0.0
        self._most_boxes = 0
        self._count = self._fitted_at = 0

    def seen(self, size: Size, boxes: int = 0) -> int:
        """Observations of a size; 0 if none had so many boxes under any size."""
        return len(self._seen.get(size, ())) if boxes <= self._most_boxes else 0

    @property
    def most_boxes(self) -> int:
        """Of any image that was observed."""
        return self._most_boxes

    def latest(self) -> tuple[Size, int] | None:
        """Size and boxes of the last observation."""
        size = next(reversed(self._seen), None)
        return (size, self._seen[size][-1][0]) if size else None

    @property
    def bytes_per_box(self) -> float:
        """Of a thousand pixels and a hundred boxes, where boxes count; 0 while that was not seen."""
        return self._line[2]

    def expected_bytes(self, size: Size, boxes: int, share: float = 1.0, bytes_per_box: float = 0.0) -> float:
        """Bytes above what is live before.

        Args:
            size: Of the micro-batch.
            boxes: Of the image that has most.
            share: Of another plan, relative to this one: what activations are multiplied by. Tables are not. Under a
                plan that keeps less they count from fewer boxes on, at worst from the first.
            bytes_per_box: For more boxes than were seen, what other plans have found: tables are the same in all.
        """
        fixed, pixels, tables = _terms(size, min(boxes, self._most_boxes), self._kink)
        c0, c1, c2 = self._line
        per_box = pixels * max(c2, bytes_per_box) / 1e2
        beyond = max(boxes - self._most_boxes, 0) * per_box
        rising = c1 * pixels * max(share, 1.0) + c2 * tables + beyond
        if share < 1.0:
            rising = min(rising, c1 * pixels * share + boxes * per_box)
        off = self._off.get(size, 0.0)
        return c0 * fixed + rising + (off if share == 1.0 else max(off, 0.0))

    def observe(self, size: Size, boxes: int, needed_bytes: int) -> None:
        """Learn what a micro-batch needed above what was live before it."""
        known, new_size = self.seen(size, boxes) > 0, size not in self._seen
        error = abs(self.expected_bytes(size, boxes) / needed_bytes - 1.0)
        rows = self._seen[size] = [*self._seen.pop(size, []), (boxes, needed_bytes)]
        if len(rows) > _KEPT:
            usual = sorted(most for most, _ in rows)[-_KEPT_FULLEST - 1]
            del rows[next(index for index, (most, _) in enumerate(rows) if most <= usual)]
        if len(self._seen) > _SIZES:
            oldest = next(iter(self._seen))
            del self._seen[oldest], self._off[oldest]
        self._most_boxes = max(self._most_boxes, boxes)
        self._count += 1
        if new_size:
            self._look_at_sizes()
        if known:
            self.spread = (0.95 * self.spread**2 + 0.05 * min(error, 0.5) ** 2) ** 0.5
        surprised = error > max(SURPRISE, 2 * self.spread)
        due = self._count - self._fitted_at >= min(self._count // 8, _REFIT)
        if not known or error > _SHOCK or (surprised and due):
            self._fit()
        else:
            self._off[size] = median(each - self._plain(size, most) for most, each in rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, for JSON."""
        return {
            "seen": [[*size, [list(row) for row in rows]] for size, rows in self._seen.items()],
            "off": [[*size, off] for size, off in self._off.items()],
            "law": [*self._line, self._kink, self.spread],
            "counts": [self._most_boxes, self._count, self._fitted_at],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._seen = {
            (images, height, width): [(boxes, bytes_) for boxes, bytes_ in rows]
            for images, height, width, rows in state["seen"]
        }
        self._off = {(images, height, width): off for images, height, width, off in state["off"]}
        c0, c1, c2, self._kink, self.spread = state["law"]
        self._line = c0, c1, c2
        self._most_boxes, self._count, self._fitted_at = state["counts"]
        self._look_at_sizes()

    def _look_at_sizes(self) -> None:
        self.largest = max((size[0] for size in self._seen), default=0)
        self.sizes = len({images * height * width for images, height, width in self._seen})

    def _plain(self, size: Size, boxes: int) -> float:
        return sum(a * b for a, b in zip(_terms(size, boxes, self._kink), self._line, strict=True))

    def _fit(self) -> None:
        seen = [(size, boxes, needed) for size, rows in self._seen.items() for boxes, needed in rows]
        needed = np.array([row[2] for row in seen], dtype=np.float64)
        boxes = np.array([row[1] for row in seen], dtype=np.float64)
        pixels = np.array([_terms(size, 0, 0)[1] for size, *_ in seen])
        low, high = float(boxes.min()), float(boxes.max())
        best = float("inf")
        for _ in range(2):  # all of the range, then around the best
            step = (high - low) / _KINKS
            kinks = low + step * np.arange(_KINKS if step else 1)
            error, line, kink = _best_line(pixels, boxes, needed, kinks)
            if error < best:
                best, self._line, self._kink = error, line, kink
            low, high = max(low, self._kink - step), min(high, self._kink + step)
        squares = 0.0
        for size, rows in self._seen.items():
            self._off[size] = median(each - self._plain(size, most) for most, each in rows)
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
    """Least relative error in which more pixels or boxes never cost less; its line and kink."""
    flat = np.stack([np.ones_like(pixels), pixels], axis=1) / needed[:, None]
    tables = pixels * np.maximum(boxes - kinks[:, None], 0.0) / 1e2 / needed
    terms = np.concatenate([np.broadcast_to(flat, (len(kinks), *flat.shape)), tables[:, :, None]], axis=2)
    # Of one size nothing tells what is fixed: too much for more images is safe.
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
    """For each of several problems `terms @ line = 1`: lines, sums of squares. `pixels`: the column of the pixels."""
    scale = np.linalg.norm(terms, axis=1, keepdims=True)
    unit = terms / np.where(scale > 0, scale, 1.0)
    ridge = np.full(terms.shape[2], _RIDGE)
    ridge[pixels] = _RIDGE * 1e-3
    squares = np.einsum("kna,knb->kab", unit, unit) + np.diag(ridge)
    solution = np.linalg.solve(squares, unit.sum(axis=1)[:, :, None])[:, :, 0]
    errors = ((np.einsum("kna,ka->kn", unit, solution) - 1.0) ** 2).sum(axis=1)
    return solution / np.where(scale > 0, scale, 1.0)[:, 0, :], errors
