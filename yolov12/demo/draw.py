"""Draws one electronic board as an inspection camera sees it, with the exact box of every part and defect.

There are three steps. *Design* chooses parts, places and defects. *Render* paints the layers: board, pads, silk screen,
scratch, shadow, parts, defects on parts. *Photograph* adds light, lens and sensor noise. Rendering is not random, so
holding classes back changes only the pixels of those defects.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov12.demo.board import (
    BoardDrawing,
    Box,
    Colour,
    DrawConfig,
    Image,
    Part,
    Polyline,
    Rect,
    class_names,
    ink_on,
    is_dark,
    tint,
)
from yolov12.demo.design import design_board
from yolov12.demo.sprites import body, bridge, crack, pads, paint_hole

_DESIGNATORS = {"resistor": "R", "capacitor": "C", "ic": "U", "led": "D", "connector": "J"}


def draw_board(rng: np.random.Generator, config: DrawConfig) -> tuple[Image, list[Box]]:
    """Draw one image.

    Args:
        rng: The source of every random choice. The same state gives the same bytes.
        config: What to draw.

    Returns:
        The image, (imgsz, imgsz, 3) uint8 in BGR order, and its labelled boxes in pixels.
    """
    drawing = design_board(rng, config)
    image, boxes = _render(drawing, config)
    return _photograph(rng, image), boxes


def _render(drawing: BoardDrawing, config: DrawConfig) -> tuple[Image, list[Box]]:
    names, scale = class_names(config.hold_back), config.scale
    image = _paint_board(drawing, config)
    above = np.zeros((*image.shape[:2], 4), np.uint8)  # the parts, BGRA
    boxes: list[Box] = []

    def label(name: str, rect: Rect) -> None:
        boxes.append(Box(names.index(name), *rect))

    for number, part in enumerate(drawing.parts):
        rect = _paste(image, pads(part, drawing.finish), part)
        if not config.dense:  # a panel has no space for text
            _paint_silk(image, rect, part, f"{_DESIGNATORS[part.kind]}{number}", ink_on(drawing.mask), scale)
        defect = part.defect if part.defect in names else ""
        if defect == "missing":
            label("missing", rect)
            continue
        sprite = body(part)
        rect = _paste(above, sprite, part, askew=defect == "shifted")
        label("shifted" if defect == "shifted" else part.kind, rect)
        if defect == "bridge":
            label("bridge", _paste(above, bridge(part), part))
        elif defect == "crack":
            label("crack", _paste(above, crack(part, sprite, scale), part))
    if drawing.scratch is not None and "scratch" in names:
        label("scratch", _paint_scratch(image, drawing.scratch, drawing.mask, scale))
    return _overlay(image, above, drop=max(1, round(2 * scale))), boxes


def _paint_board(drawing: BoardDrawing, config: DrawConfig) -> Image:
    """Paint the belt, the board edge, solder mask, copper, drilled holes, and the score lines of a panel."""
    size, scale = config.imgsz, config.scale
    x0, y0, x1, y1 = drawing.board
    image = np.full((size, size, 3), (46, 48, 50), np.uint8)
    thin = max(1, round(scale))
    cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), tint(drawing.mask, 0.6), -1)
    cv2.rectangle(image, (x0 + thin, y0 + thin), (x1 - 1 - thin, y1 - 1 - thin), drawing.mask, -1)
    copper = tint(drawing.mask, 1.2, 13) if is_dark(drawing.mask) else tint(drawing.mask, 0.9)
    for left, top, right, bottom in drawing.pours:
        cv2.rectangle(image, (left, top), (right, bottom), tint(drawing.mask, 1.1, 5), -1)
    # A gap in the colour of the solder mask surrounds each trace. It shows where a trace crosses a pour.
    cv2.polylines(image, drawing.traces, False, drawing.mask, max(3, round(4 * scale)))
    cv2.polylines(image, drawing.traces, False, copper, max(1, round(1.7 * scale)), cv2.LINE_AA)
    for trace in drawing.traces:
        paint_hole(image, trace[-1].tolist(), 2.4 * scale, drawing.finish)
    cv2.polylines(image, drawing.scores, False, tint(drawing.mask, 0.55), thin)
    for corner in drawing.screws:
        paint_hole(image, corner, 8 * scale, drawing.finish)
    return image


def _paint_silk(image: Image, rect: Rect, part: Part, name: str, ink: Colour, scale: float) -> None:
    """Paint the silk screen: a frame around the pads of most parts, and the designator above."""
    x0, y0, x1, y1 = rect
    gap = round(2 * scale)
    if part.look[4] < 0.7:
        corners = (x0 - gap, y0 - gap), (x1 + gap - 1, y1 + gap - 1)
        cv2.rectangle(image, *corners, ink, max(1, round(0.7 * scale)))
    at = x0, y0 - gap - 2
    cv2.putText(image, name, at, cv2.FONT_HERSHEY_SIMPLEX, 0.26 * scale, ink, 1, cv2.LINE_AA)


def _paint_scratch(image: Image, line: Polyline, mask: Colour, scale: float) -> Rect:
    """Paint a scratch in the solder mask, bare copper beside a dark edge. Returns its bounding rectangle."""
    seen = np.zeros(image.shape[:2], np.uint8)
    width = max(1, round(1.2 * scale))
    copper = (120, 185, 225) if is_dark(mask) else (60, 105, 150)
    for stroke, colour in ((line + np.array([width, 0], np.int32), tint(mask, 0.5)), (line, copper)):
        cv2.polylines(image, [stroke], False, colour, width)
        cv2.polylines(seen, [stroke], False, (255,), width)
    return _bounds(seen)


def _paste(layer: Image, sprite: Image, part: Part, askew: bool = False) -> Rect:
    """Copy the opaque pixels of a sprite to the place of its part. Returns their bounding rectangle.

    `layer` is BGR or BGRA. `askew` shifts and rotates the sprite.
    """
    sprite = np.ascontiguousarray(np.rot90(sprite, part.turns))
    if askew:
        sprite = _slip(sprite, part)
    h, w = sprite.shape[:2]
    x0, y0 = part.x - w // 2, part.y - h // 2
    alpha = sprite[..., 3]
    cv2.copyTo(sprite[..., : layer.shape[2]], alpha, layer[y0 : y0 + h, x0 : x0 + w])
    return _bounds(alpha, x0, y0)


def _slip(sprite: Image, part: Part) -> Image:
    """Rotate and shift a sprite like a part that was placed badly."""
    h, w = sprite.shape[:2]
    side = part.room_px
    angle = (18 + 22 * part.defect_look[0]) * (1 if part.defect_look[1] < 0.5 else -1)
    matrix: NDArray[np.float64] = np.array(cv2.getRotationMatrix2D((w / 2, h / 2), angle, 1.0))
    slip = 0.12 * min(h, w) * np.sign(part.defect_look[2:4] - 0.5)
    matrix[:, 2] += (side - w) / 2 + slip[0], (side - h) / 2 + slip[1]
    turned = np.zeros((side, side, 4), np.uint8)
    cv2.warpAffine(sprite, matrix, (side, side), turned, cv2.INTER_NEAREST)
    return turned


def _bounds(opaque: Image, left: int = 0, top: int = 0) -> Rect:
    x, y, w, h = cv2.boundingRect(opaque)
    return left + x, top + y, left + x + w, top + y + h


def _overlay(image: Image, above: Image, drop: int) -> Image:
    """Put the parts on the board, with a shadow `drop` pixels to the lower right."""
    cover = above[..., 3]
    shadow = cv2.blur(np.roll(cover, (drop, drop), (0, 1)), (2 * drop + 1, 2 * drop + 1))
    cv2.convertScaleAbs(image * (1 - shadow[..., None] * np.float32(0.55 / 255)), image)
    cv2.copyTo(above[..., :3], cover, image)
    return image


def _photograph(rng: np.random.Generator, image: Image) -> Image:
    """Add uneven light, a slight blur of the lens, and sensor noise."""
    size = len(image)
    corners = rng.uniform(0.78, 1.16, (3, 3)).astype(np.float32)
    light = cv2.resize(corners, (size, size), interpolation=cv2.INTER_CUBIC)
    focused = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.7))
    grain = cv2.GaussianBlur(rng.standard_normal((size, size), np.float32), (3, 3), 0.5)
    noise = grain * np.float32(rng.uniform(2.0, 6.0))
    photo: NDArray[np.float32] = focused * light[..., None] + noise[..., None]
    return np.clip(photo, 0, 255).astype(np.uint8)
