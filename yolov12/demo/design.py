"""Designs a board: chooses parts, places and defects. After that, only the camera makes random choices."""

from collections.abc import Iterator

import cv2
import numpy as np

from yolov12.demo.board import (
    CAN_FROM,
    CLASS_NAMES,
    BoardDrawing,
    DrawConfig,
    Image,
    Part,
    Polyline,
    Rect,
    tint,
    to_pixels,
)

_PART_KINDS = CLASS_NAMES[:5]
_SPARSE_ODDS = (0.36, 0.28, 0.14, 0.13, 0.09)  # probability of each part kind on an ordinary board
_DENSE_ODDS = (0.45, 0.33, 0.07, 0.15, 0.0)  # and on a panel, which holds mostly small passives
_MASKS = (  # colours of the solder mask, BGR
    (52, 98, 28), (40, 74, 18), (70, 120, 52), (128, 62, 18), (92, 44, 22),
    (36, 30, 142), (34, 33, 36), (214, 220, 222), (96, 30, 78),
)  # fmt: skip
_FINISHES = ((96, 178, 216), (186, 192, 196), (150, 198, 220))  # colours of the pads, BGR: gold, tin, pale gold


def design_board(rng: np.random.Generator, config: DrawConfig) -> BoardDrawing:
    """Design one board.

    Args:
        rng: The source of every random choice.
        config: Size and kind of the board. `hold_back` does not change the design.

    Returns:
        The objects on the board, in pixels.
    """
    size, scale = config.imgsz, config.scale
    inset = np.round(rng.uniform(0.0, 0.05, 4) * (rng.random(4) < 0.6) * size).astype(int).tolist()
    board = x0, y0, x1, y1 = inset[0], inset[1], size - inset[2], size - inset[3]
    border, reach = round(5 * scale), round(14 * scale)
    taken = np.full((size, size), 255, np.uint8)  # nonzero pixels are occupied
    taken[y0 + border : y1 - border, x0 + border : x1 - border] = 0

    mask = tint(_MASKS[rng.integers(len(_MASKS))], rng.uniform(0.85, 1.15))
    finish = _FINISHES[rng.integers(len(_FINISHES))]
    scratch = _design_scratch(rng, board, scale) if rng.random() < 0.3 else None
    if scratch is not None:  # no part may cover an end of the scratch
        cv2.polylines(taken, [scratch], False, (255,), round(10 * scale))
    screws: list[tuple[int, int]] = []
    scores: list[Polyline] = []
    if config.dense:
        parts, scores = _place_panel(rng, (x0 + border, y0 + border, x1 - border, y1 - border), taken, scale)
    else:
        if rng.random() < 0.5:
            screws = [(x0 + reach, y0 + reach), (x1 - reach, y1 - reach)]
        for corner in screws:
            cv2.circle(taken, corner, reach, (255,), -1)
        parts = _place_parts(rng, board, taken, scale)
    traces = [trace for part in parts for trace in _route_traces(rng, part, board, scale)]
    pours = [_design_pour(rng, board) for _ in range(int(rng.integers(1, 5)))]
    return BoardDrawing(board, mask, finish, parts, traces, pours, scores, screws, scratch)


def _design_scratch(rng: np.random.Generator, board: Rect, scale: float) -> Polyline:
    # No scratch is parallel to an axis: its box would be one pixel thin, which no detector can learn.
    start, bend = rng.uniform(0.4, 1.1) + rng.integers(2) * np.pi / 2, rng.uniform(-0.3, 0.3)
    slant = start + bend * np.linspace(0, 1, 7)
    along_px = np.linspace(-0.5, 0.5, 7) * rng.uniform(28, 90) * scale
    x0, y0, x1, y1 = board
    reach = 50 * scale
    centre = rng.uniform((x0 + reach, y0 + reach), (x1 - reach, y1 - reach))
    return to_pixels(np.stack([np.cos(slant), np.sin(slant)], 1) * along_px[:, None] + centre)


def _design_pour(rng: np.random.Generator, board: Rect) -> Rect:
    (left, right), (top, bottom) = np.sort(rng.uniform(0.02, 0.98, (2, 2)), 1)
    x0, y0, x1, y1 = board
    wide, high = x1 - x0, y1 - y0
    return int(x0 + left * wide), int(y0 + top * high), int(x0 + right * wide), int(y0 + bottom * high)


def _route_traces(rng: np.random.Generator, part: Part, board: Rect, scale: float) -> list[Polyline]:
    """Route parallel copper traces away from a part: straight, then at 45 degrees, then straight."""
    lines = int(rng.integers(1, 7 if part.kind in ("ic", "connector") else 3))
    legs_px = rng.uniform((8, 4, 10), (50, 30, 90)) * scale
    eighths = int(rng.integers(4)) * 2 + np.array([0, rng.choice((-1, 1)), 0])  # heading of each leg
    steps = np.stack([np.cos(eighths * np.pi / 4), np.sin(eighths * np.pi / 4)], 1) * legs_px[:, None]
    path = np.array([part.x, part.y]) + np.cumsum(np.vstack([np.zeros(2), steps]), 0)
    apart = steps[0, ::-1] * (-1, 1) / legs_px[0] * 4 * scale
    low, high = np.array(board[:2]) + 6 * scale, np.array(board[2:]) - 6 * scale
    return [to_pixels(np.clip(path + apart * (n - (lines - 1) / 2), low, high)) for n in range(lines)]


def _place_parts(rng: np.random.Generator, board: Rect, taken: Image, scale: float) -> list[Part]:
    """Place 5 to 38 parts on an ordinary board (log-normal, median 14), large parts first, passives in rows."""
    count = int(np.clip(np.exp(rng.normal(np.log(14), 0.55)), 5, 38))
    kinds = [_PART_KINDS[k] for k in rng.choice(len(_PART_KINDS), count, p=_SPARSE_ODDS)]
    wanted = [(kind, *_size_of(rng, kind, scale)) for kind in kinds]
    wanted.sort(key=lambda part: -part[1] * part[2])
    parts: list[Part] = []
    for kind, w, h in wanted:
        look, defect_look = rng.random(6), rng.random(6)
        defect = _defect_of(kind, w, h, rng.random(), 1.0, scale)
        if kind == "capacitor" and look[0] > CAN_FROM:
            h = w = round(w * 0.95)  # an aluminium can is round
        before = parts[-1] if parts and parts[-1].kind == kind else None
        for x, y, turns in _places(rng, kind, h, before, board, scale):
            part = Part(kind, x, y, w, h, turns, look, defect_look, defect)
            if _claim(taken, part, gap=round(5 * scale)):
                parts.append(part)
                break
    return parts


def _size_of(rng: np.random.Generator, kind: str, scale: float) -> tuple[int, int]:
    """Choose width and height of a part in pixels, before turning."""
    low, high, ratio = {
        "resistor": (12, 22, 0.5),
        "capacitor": (13, 26, 0.62),
        "ic": (28, 60, rng.uniform(0.6, 1.0)),
        "led": (13, 18, 0.6),
        "connector": (38, 80, rng.uniform(0.22, 0.34)),
    }[kind]
    width = rng.uniform(low, high) * scale
    return round(width), round(max(width * ratio, (11 if kind == "connector" else 6) * scale))


def _defect_of(kind: str, w: int, h: int, roll: float, rarity: float, scale: float) -> str:
    """Choose the defect of a part, or "". A bridge needs pins, and a crack needs a body large enough to show it."""
    odds = {"missing": 0.06, "shifted": 0.0 if kind == "connector" else 0.055}
    if kind == "ic":
        odds["bridge"] = 0.25
    if kind != "led" and min(w, h) >= 9 * scale:
        odds["crack"] = 0.13
    for defect, chance in odds.items():
        roll -= chance * rarity
        if roll < 0:
            return defect
    return ""


def _places(
    rng: np.random.Generator, kind: str, h: int, before: Part | None, board: Rect, scale: float
) -> Iterator[tuple[int, int, int]]:
    """Propose thirty places (x, y, quarter turns): connectors at an edge, passives in a row with `before`."""
    x0, y0, x1, y1 = board
    for attempt in range(30):
        turns = int(rng.integers(4))
        x, y = int(rng.integers(x0, x1)), int(rng.integers(y0, y1))
        if kind == "connector" and attempt < 20:  # cables enter at the side of the board
            near = round(h / 2 + rng.uniform(7, 12) * scale)
            x, y = [(x, y0 + near), (x0 + near, y), (x, y1 - near), (x1 - near, y)][turns]
        elif before and kind != "ic" and attempt < 5:
            turns, step = before.turns, round((before.h + h) / 2 + 6 * scale)
            x, y = (before.x, before.y + step) if turns % 2 == 0 else (before.x + step, before.y)
        yield x, y, turns


def _claim(taken: Image, part: Part, gap: int) -> bool:
    """Reserve the place of a part if it and `gap` pixels around it are free. Returns True if it was reserved."""
    w, h = (part.w, part.h) if part.turns % 2 == 0 else (part.h, part.w)
    if part.defect == "shifted":
        w = h = part.room_px
    left, top = part.x - w // 2 - gap, part.y - h // 2 - gap
    right, bottom = left + w + 2 * gap, top + h + 2 * gap
    inside = min(left, top) >= 0 and max(right, bottom) <= len(taken)
    if not inside or taken[top:bottom, left:right].any():
        return False
    shared = gap // 2  # the next part may use this half of the gap
    taken[top + shared : bottom - shared, left + shared : right - shared] = 255
    return True


def _place_panel(rng: np.random.Generator, area: Rect, taken: Image, scale: float) -> tuple[list[Part], list[Polyline]]:
    """Fill a panel of equal modules, 13 x 13 to 18 x 18 places, nearly all occupied. Returns parts and score lines."""
    x0, y0, x1, y1 = area
    cells, side = int(rng.integers(13, 19)), int(rng.integers(2, 5))
    pitch_px = min(x1 - x0, y1 - y0) / cells
    kinds = rng.choice(len(_PART_KINDS), (side, side), p=_DENSE_ODDS)
    looks, turns = rng.random((side, side, 6)), rng.integers(0, 2, (side, side))
    looks[..., 0] *= 0.6  # no aluminium cans among parts this small
    defect_looks, rolls = rng.random((cells, cells, 6)), rng.random((cells, cells))
    parts: list[Part] = []
    for row, column in np.ndindex(cells, cells):
        slot = row % side, column % side
        kind, look = _PART_KINDS[kinds[slot]], looks[slot]
        w = round(pitch_px * (0.62 + 0.12 * look[5]))
        h = max(4, round(w * (0.9 if kind == "ic" else 0.55)))
        x, y = round(x0 + (column + 0.5) * pitch_px), round(y0 + (row + 0.5) * pitch_px)
        half = round(pitch_px / 2) - 1
        if not taken[y - half : y + half, x - half : x + half].any():
            defect = _defect_of(kind, w, h, rolls[row, column], 0.4, scale)
            parts.append(Part(kind, x, y, w, h, int(turns[slot]), look, defect_looks[row, column], defect))
    scores: list[Polyline] = []
    for cut in np.arange(side, cells, side) * pitch_px:
        scores.append(to_pixels(np.array([(x0 + cut, y0), (x0 + cut, y1)])))
        scores.append(to_pixels(np.array([(x0, y0 + cut), (x1, y0 + cut)])))
    return parts, scores
