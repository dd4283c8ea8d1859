"""Data types of a drawn board: classes, parts, `BoardDrawing`, and colour helpers.

Length constants in this package are pixels of a 320-pixel image. They scale with the image size.
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
DEFECTS = CLASS_NAMES[5:]
HELD_BACK = CLASS_NAMES[-2:]  # the last classes: holding them back changes no other class id
CAN_FROM = 0.62  # a capacitor with a larger look[0] is a round aluminium can

Image = NDArray[np.uint8]  # (height, width, channels) uint8, BGR or BGRA
Colour = tuple[float, ...]  # BGR or BGRA, 0 to 255
Polyline = NDArray[np.int32]  # points (n, 2): x and y in pixels
Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are excluded


@dataclass(frozen=True)
class DrawConfig:
    """Settings of one image."""

    imgsz: int
    """Side of the square image in pixels."""
    dense: bool = False
    """Draw a panel of 150 to 320 small parts instead of one board."""
    hold_back: tuple[str, ...] = ()
    """Defect classes to leave out. Boards are drawn without these defects."""

    @property
    def scale(self) -> float:
        """Pixels of this image per pixel of a 320-pixel image."""
        return self.imgsz / 320


@dataclass(frozen=True)
class Box:
    """A labelled rectangle: `x0 <= x < x1` and `y0 <= y < y1` in pixels. `class_id` is an index of `class_names`."""

    class_id: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True)
class Part:
    """A placed part. It is painted without rotation, then turned."""

    kind: str
    x: int  # centre, pixels
    y: int
    w: int  # size before turning, pixels; w is the side along the terminals
    h: int
    turns: int  # quarter turns
    look: NDArray[np.float64]  # six numbers from 0 to 1 that choose variant, colours, pin count and text
    defect_look: NDArray[np.float64]  # six numbers from 0 to 1 that choose place and shape of the defect
    defect: str  # class name of the defect, or "" for none

    @property
    def room_px(self) -> int:
        """Side in pixels of a square that contains the part however it is shifted and rotated."""
        return round(math.hypot(self.w, self.h) + 0.26 * min(self.w, self.h))


@dataclass(frozen=True)
class BoardDrawing:
    """All objects on one board, before rendering."""

    board: Rect
    mask: Colour  # colour of the solder mask
    finish: Colour  # colour of the pads
    parts: list[Part]
    traces: list[Polyline]
    pours: list[Rect]  # copper areas under the solder mask
    scores: list[Polyline]  # lines along which a panel is broken into modules
    screws: list[tuple[int, int]]
    scratch: Polyline | None


def class_names(hold_back: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the classes that are drawn. The position of a name is its class id."""
    return tuple(name for name in CLASS_NAMES if name not in hold_back)


def to_pixels(points: NDArray[np.float64]) -> Polyline:
    """Round points (n, 2) to the nearest pixels."""
    return np.rint(points).astype(np.int32)


def tint(colour: Colour, factor: float, add: float = 0.0) -> Colour:
    """Multiply a colour by `factor`, add `add`, and limit each channel to 255."""
    return tuple(min(255.0, c * factor + add) for c in colour)


def is_dark(bgr: Sequence[float]) -> bool:
    """Return True if light text is easier to read on this colour than dark text."""
    return sum(bgr) < 400


def ink_on(bgr: Sequence[float]) -> Colour:
    """Return a text colour that is easy to read on this colour."""
    return (225, 228, 226) if is_dark(bgr) else (40, 40, 42)
