"""Draw one electronic board as an inspection camera sees it, with the exact box of every part and defect.

Three steps. *Plan*: choose what stands where. *Render*: paint the plan in layers (board, pads, silk screen,
scratch, shadow, parts, defects on parts). *Photograph*: light, lens and sensor. Because rendering is not random,
holding classes back changes nothing but those defects: the rest of the picture is the same.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov12.demo.board import (
    CLASS_NAMES,
    Box,
    Colour,
    DrawConfig,
    Image,
    Line,
    Part,
    Plan,
    Rect,
    class_names,
    ink_on,
    is_dark,
    tint,
)
from yolov12.demo.plan import plan_board
from yolov12.demo.sprites import body, bridge, crack, pads, paint_hole

_DESIGNATORS = {"resistor": "R", "capacitor": "C", "ic": "U", "led": "D", "connector": "J"}


def draw_board(rng: np.random.Generator, config: DrawConfig) -> tuple[Image, list[Box]]:
    """Draw one image: uint8, (imgsz, imgsz, 3), BGR; and its boxes. Same generator state, same bytes."""
    plan = plan_board(rng, config)
    image, boxes = _render(plan, config)
    return _photograph(rng, image), boxes


def _render(plan: Plan, config: DrawConfig) -> tuple[Image, list[Box]]:
    names, scale = class_names(config.hold_back), config.scale
    image = _paint_board(plan, config)
    above = np.zeros((*image.shape[:2], 4), np.uint8)  # the layer of the parts
    boxes: list[Box] = []

    def label(name: str, rect: Rect) -> None:
        boxes.append(Box(CLASS_NAMES.index(name), *rect))

    for number, part in enumerate(plan.parts):
        rect = _paste(image, pads(part, plan.finish), part)
        if not config.dense:  # a panel has no room for print
            _paint_silk(image, rect, part, f"{_DESIGNATORS[part.kind]}{number}", ink_on(plan.mask), scale)
        flaw = part.flaw if part.flaw in names else ""
        if flaw == "missing":
            label("missing", rect)
            continue
        sprite = body(part)
        rect = _paste(above, sprite, part, askew=flaw == "shifted")
        label("shifted" if flaw == "shifted" else part.kind, rect)
        if flaw == "bridge":
            label("bridge", _paste(above, bridge(part), part))
        elif flaw == "crack":
            label("crack", _paste(above, crack(part, sprite), part))
    if plan.scratch is not None:
        label("scratch", _paint_scratch(image, plan.scratch, plan.mask, scale))
    return _overlay(image, above, drop=max(1, round(2 * scale))), boxes


def _paint_board(plan: Plan, config: DrawConfig) -> Image:
    """Belt, board edge, solder mask, copper, drilled holes, and the score lines of a panel."""
    size, scale = config.imgsz, config.scale
    x0, y0, x1, y1 = plan.board
    image = np.full((size, size, 3), (46, 48, 50), np.uint8)
    thin = max(1, round(scale))
    cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), tint(plan.mask, 0.6), -1)
    cv2.rectangle(image, (x0 + thin, y0 + thin), (x1 - 1 - thin, y1 - 1 - thin), plan.mask, -1)
    copper = tint(plan.mask, 1.2, 13) if is_dark(plan.mask) else tint(plan.mask, 0.9)
    for left, top, right, bottom in plan.pours:
        cv2.rectangle(image, (left, top), (right, bottom), tint(plan.mask, 1.1, 5), -1)
    # The traces lie in a moat of bare board, which shows where they cross a pour.
    cv2.polylines(image, plan.traces, False, plan.mask, max(3, round(4 * scale)))
    cv2.polylines(image, plan.traces, False, copper, max(1, round(1.7 * scale)), cv2.LINE_AA)
    for trace in plan.traces:
        paint_hole(image, trace[-1].tolist(), 2.4 * scale, plan.finish)
    cv2.polylines(image, plan.scores, False, tint(plan.mask, 0.55), thin)
    for corner in plan.screws:
        paint_hole(image, corner, 8 * scale, plan.finish)
    return image


def _paint_silk(image: Image, rect: Rect, part: Part, name: str, ink: Colour, scale: float) -> None:
    """The print: a frame around the pads of most parts, and the part's designator above it."""
    x0, y0, x1, y1 = rect
    gap = round(2 * scale)
    if part.look[4] < 0.7:
        corners = (x0 - gap, y0 - gap), (x1 + gap - 1, y1 + gap - 1)
        cv2.rectangle(image, *corners, ink, max(1, round(0.7 * scale)))
    at = x0, y0 - gap - 2
    cv2.putText(image, name, at, cv2.FONT_HERSHEY_SIMPLEX, 0.26 * scale, ink, 1, cv2.LINE_AA)


def _paint_scratch(image: Image, line: Line, mask: Colour, scale: float) -> Rect:
    """Lacquer torn off: bare copper beside a dark edge."""
    seen = np.zeros(image.shape[:2], np.uint8)
    width = max(1, round(1.2 * scale))
    copper = (120, 185, 225) if is_dark(mask) else (60, 105, 150)
    for stroke, colour in ((line + np.array([width, 0], np.int32), tint(mask, 0.5)), (line, copper)):
        cv2.polylines(image, [stroke], False, colour, width)
        cv2.polylines(seen, [stroke], False, (255,), width)
    return _bounds(seen)


def _paste(layer: Image, sprite: Image, part: Part, askew: bool = False) -> Rect:
    """Lay the opaque pixels of a part's sprite in its place on the layer (BGR or BGRA); their bounding rectangle."""
    sprite = np.ascontiguousarray(np.rot90(sprite, part.turns))
    if askew:
        sprite = _slip(sprite, part)
    h, w = sprite.shape[:2]
    x0, y0 = part.x - w // 2, part.y - h // 2
    alpha = sprite[..., 3]
    cv2.copyTo(sprite[..., : layer.shape[2]], alpha, layer[y0 : y0 + h, x0 : x0 + w])
    return _bounds(alpha, x0, y0)


def _slip(sprite: Image, part: Part) -> Image:
    """The sprite, turned and moved as a slipped placement would."""
    h, w = sprite.shape[:2]
    side = part.room_px
    angle = (18 + 22 * part.fate[0]) * (1 if part.fate[1] < 0.5 else -1)
    matrix: NDArray[np.float64] = np.array(cv2.getRotationMatrix2D((w / 2, h / 2), angle, 1.0))
    slip = 0.12 * min(h, w) * np.sign(part.fate[2:4] - 0.5)
    matrix[:, 2] += (side - w) / 2 + slip[0], (side - h) / 2 + slip[1]
    turned = np.zeros((side, side, 4), np.uint8)
    cv2.warpAffine(sprite, matrix, (side, side), turned, cv2.INTER_NEAREST)
    return turned


def _bounds(opaque: Image, left: int = 0, top: int = 0) -> Rect:
    x, y, w, h = cv2.boundingRect(opaque)
    return left + x, top + y, left + x + w, top + y + h


def _overlay(image: Image, above: Image, drop: int) -> Image:
    """The parts on the board, and the shadow they throw `drop` pixels to the lower right."""
    cover = above[..., 3]
    shadow = cv2.blur(np.roll(cover, (drop, drop), (0, 1)), (2 * drop + 1, 2 * drop + 1))
    cv2.convertScaleAbs(image * (1 - shadow[..., None] * np.float32(0.55 / 255)), image)
    cv2.copyTo(above[..., :3], cover, image)
    return image


def _photograph(rng: np.random.Generator, image: Image) -> Image:
    """Uneven light, a lens slightly out of focus, and sensor noise."""
    size = len(image)
    corners = rng.uniform(0.78, 1.16, (3, 3)).astype(np.float32)
    light = cv2.resize(corners, (size, size), interpolation=cv2.INTER_CUBIC)
    focused = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.7))
    grain = cv2.GaussianBlur(rng.standard_normal((size, size), np.float32), (3, 3), 0.5)
    noise = grain * np.float32(rng.uniform(2.0, 6.0))
    photo: NDArray[np.float32] = focused * light[..., None] + noise[..., None]
    return np.clip(photo, 0, 255).astype(np.uint8)
