"""What a drawn board is: its classes, the plan of what stands where, and the colours everything agrees on.

Lengths in the tables of this package are pixels of a 320-pixel image; they grow with the image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLASS_NAMES = (
    "resistor", "capacitor", "ic", "led", "connector",
    "missing", "bridge", "scratch", "shifted", "crack",
)  # fmt: skip
HELD_BACK_COUNT = 2  # the last classes of the list, so that the ids of the others never change
CAN_FROM = 0.62  # a capacitor whose look[0] is above this is a round aluminium can

Image = NDArray[np.uint8]  # (height, width, channels), BGR or BGRA
Colour = tuple[float, ...]  # BGR or BGRA, 0 to 255
Line = NDArray[np.int32]  # points (n, 2), x and y in pixels
Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the end excluded


@dataclass(frozen=True)
class DrawConfig:
    """What to draw. `imgsz`: side in pixels. `dense`: a panel of 150 to 320 small parts instead of one board.

    `hold_back`: leave out the last `HELD_BACK_COUNT` classes; parts that would carry such a defect are sound.
    """

    imgsz: int
    dense: bool = False
    hold_back: bool = False

    @property
    def scale(self) -> float:
        """Pixels of this image per pixel of a 320-pixel one."""
        return self.imgsz / 320


@dataclass(frozen=True)
class Box:
    """A labelled rectangle in pixels: `x0 <= x < x1`, `y0 <= y < y1`; `class_id` indexes CLASS_NAMES."""

    class_id: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True)
class Part:
    """A part in its place; painted lying flat, then turned."""

    kind: str
    x: int  # centre, pixels
    y: int
    w: int  # size before turning, pixels; w is along the terminals
    h: int
    turns: int  # quarter turns
    look: NDArray[np.float64]  # six uniforms that decide variant, colours, pin count, text
    fate: NDArray[np.float64]  # six uniforms that decide where and how a defect shows
    flaw: str  # the class of its defect, or ""

    @property
    def room_px(self) -> int:
        """Side of the square in which the part can slip and turn."""
        return round(math.hypot(self.w, self.h) + 0.26 * min(self.w, self.h))


@dataclass(frozen=True)
class Plan:
    """Everything on one board."""

    board: Rect
    mask: Colour  # of the solder mask
    finish: Colour  # of the pads
    parts: list[Part]
    traces: list[Line]
    pours: list[Rect]  # areas of copper under the solder mask
    scores: list[Line]  # where a panel is later broken into modules
    screws: list[tuple[int, int]]
    scratch: Line | None


def class_names(hold_back: bool) -> tuple[str, ...]:
    """Names of the classes that are drawn; the position is the class id."""
    return CLASS_NAMES[:-HELD_BACK_COUNT] if hold_back else CLASS_NAMES


def to_pixels(points: NDArray[np.float64]) -> Line:
    """The nearest whole pixels."""
    return np.rint(points).astype(np.int32)


def tint(colour: Colour, factor: float, add: float = 0.0) -> Colour:
    """A lighter or darker shade."""
    return tuple(min(255.0, c * factor + add) for c in colour)


def is_dark(bgr: Sequence[float]) -> bool:
    """Whether light print reads better on this colour than dark."""
    return sum(bgr) < 400


def ink_on(bgr: Sequence[float]) -> Colour:
    """The colour of print that reads well on this one."""
    return (225, 228, 226) if is_dark(bgr) else (40, 40, 42)
