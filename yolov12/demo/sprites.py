"""Paints parts, pads and defects as sprites: small transparent images, (height, width, 4) uint8 in BGRA order.

The label box of an object is the bounding rectangle of the opaque pixels of its sprite, so boxes are exact.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from yolov12.demo.board import CAN_FROM, Colour, Image, Part, Rect, ink_on, tint, to_pixels

_SILVER = (178, 184, 188, 255)
_LENSES = ((60, 60, 235), (80, 215, 90), (235, 140, 60), (90, 225, 240), (225, 245, 250))
_SHELLS = ((224, 230, 232), (44, 42, 42), (150, 190, 206))  # colours of connector housings
_LABELS = ("LM358", "ATM32", "74HC0", "U2F4", "NE555", "TPS62", "MX25L", "ESP8")


def pads(part: Part, finish: Colour) -> Image:
    """Paint the metal pads under the pins of a part."""
    more = _margin(part)
    sprite = _blank(part, more)
    for x0, y0, x1, y1 in _pins(part):
        if part.kind == "connector":
            centre = (x0 + x1) // 2 + more, (y0 + y1) // 2 + more
            paint_hole(sprite, centre, (x1 - x0) * 0.8, (*finish, 255))
            continue
        upright = part.kind == "ic" and (y0 == 0 or y1 == part.h)
        grow_x, grow_y = (0, more) if upright else (more, 0)
        corners = (x0 + more - grow_x, y0 + more - grow_y), (x1 + more + grow_x - 1, y1 + more + grow_y - 1)
        cv2.rectangle(sprite, *corners, (*finish, 255), -1)
    return sprite


def body(part: Part) -> Image:
    """Paint a part with its pins and its marking."""
    sprite = _blank(part)
    if part.kind != "connector":
        for x0, y0, x1, y1 in _pins(part):
            cv2.rectangle(sprite, (x0, y0), (x1 - 1, y1 - 1), _SILVER, -1)
    paint = {
        "resistor": _paint_resistor,
        "capacitor": _paint_capacitor,
        "ic": _paint_ic,
        "led": _paint_led,
        "connector": _paint_connector,
    }[part.kind]
    marking = paint(sprite, part)  # text to print on the part
    if marking and part.h >= 9:
        _engrave(sprite, marking)
    return sprite


def bridge(part: Part) -> Image:
    """Paint a solder bridge between two neighbouring legs."""
    more, leg = _margin(part), _leg(part)
    sprite = _blank(part, more)
    row = [pin for pin in _pins(part) if pin[1] == 0 and pin[3] == leg]
    first = int(part.defect_look[0] * (len(row) - 1))
    left, right = row[first][0] + more, row[first + 1][2] + more
    centre, axes = ((left + right) // 2, more + leg // 2), ((right - left) // 2 + 1, leg // 2 + more)
    cv2.ellipse(sprite, centre, axes, 0, 0, 360, (168, 174, 178, 255), -1)
    cv2.ellipse(sprite, centre, axes, 0, 0, 140, (110, 114, 118, 255), 1)
    cv2.circle(sprite, (centre[0] - 1, centre[1] - 1), max(1, leg // 3), (240, 242, 244, 255), -1)
    return sprite


def crack(part: Part, body: Image, scale: float) -> Image:
    """Paint a jagged crack across the body: a dark gap with a bright edge."""
    sprite = np.zeros_like(body)
    down = np.linspace(0, 1, len(part.defect_look))
    lean = (0.55 + 0.3 * part.defect_look[1]) * (1 if part.defect_look[0] < 0.5 else -1)
    xs = part.w * (0.35 + 0.3 * part.defect_look[0]) + part.h * (lean * (down - 0.5) + (part.defect_look - 0.5) * 0.3)
    line = to_pixels(np.stack([xs, down * (part.h - 1)], 1))
    thick = max(1, round(scale), round(part.h / 18))
    cv2.polylines(sprite, [line + np.array([thick, 0], np.int32)], False, (198, 202, 204, 255), thick)
    cv2.polylines(sprite, [line], False, (8, 8, 8, 255), thick)
    sprite[body[..., 3] == 0] = 0
    return sprite


def paint_hole(image: Image, centre: Sequence[int], radius: float, finish: Colour) -> None:
    """Paint a drilled hole in a metal ring. On a sprite the hole is transparent, because its colour has no alpha."""
    cv2.circle(image, centre, round(radius), finish, -1, cv2.LINE_AA)
    cv2.circle(image, centre, round(radius * 0.55), (28, 28, 28), -1, cv2.LINE_AA)


def _blank(part: Part, margin: int = 0) -> Image:
    return np.zeros((part.h + 2 * margin, part.w + 2 * margin, 4), np.uint8)


def _margin(part: Part) -> int:
    """Return the pixels by which pads and bridges extend beyond the part."""
    return max(1, round(part.h * 0.08))


def _leg(part: Part) -> int:
    """Return the length of the legs of an IC in pixels."""
    return max(2, round(min(part.w, part.h) * 0.13))


def _cap(part: Part) -> int:
    """Return the length of the metal caps at both ends of a passive, in pixels."""
    return max(2, round(part.w * 0.2))


def _is_quad(part: Part) -> bool:
    """Return True if an IC has legs on all four sides."""
    return bool(part.look[0] < 0.4)


def _pins(part: Part) -> list[Rect]:
    """Return the metal of a part in sprite pixels: two ends, two or four rows of legs, or a row of posts."""
    w, h = part.w, part.h
    if part.kind == "ic":
        return _legs(part)
    if part.kind == "connector":
        post = max(2, round(h * 0.26))
        y = (h - post) // 2
        return [(x, y, x + post, y + post) for x in range(post, w - 2 * post, round(post * (2.2 + part.look[3])))]
    end = max(2, round(w * 0.22))
    return [(0, 0, end, h), (w - end, 0, w, h)]


def _legs(part: Part) -> list[Rect]:
    w, h, leg = part.w, part.h, _leg(part)
    pitch = max(3, round(w / (4 + 6 * part.look[3])))

    def starts(length: int) -> range:
        count = max(2, (length - 2 * leg) // pitch)
        first = (length - (count - 1) * pitch - pitch // 2) // 2
        return range(first, first + count * pitch, pitch)

    rows = [(x, y, x + pitch // 2, y + leg) for y in (0, h - leg) for x in starts(w)]
    sides = [(x, y, x + leg, y + pitch // 2) for x in (0, w - leg) for y in starts(h)]
    return rows + sides if _is_quad(part) else rows


def _paint_resistor(sprite: Image, part: Part) -> str:
    cap, look = _cap(part), part.look
    _block(sprite, cap, 0, part.w - cap, part.h, (38, 36, 36) if look[0] < 0.75 else (128, 84, 40))
    return f"{int(look[2] * 90) + 10}{int(look[3] * 5)}"


def _paint_capacitor(sprite: Image, part: Part) -> str:
    w, h, cap, look = part.w, part.h, _cap(part), part.look
    if look[0] > CAN_FROM:
        centre, radius = (w // 2, h // 2), w // 2 - 1
        _block(sprite, 0, 0, w, h, (52, 50, 50))
        cv2.circle(sprite, centre, radius, (206, 210, 212, 255), -1)
        cv2.ellipse(sprite, centre, (radius, radius), 0, 130, 230, (58, 50, 46, 255), -1)
        cv2.circle(sprite, centre, radius, (150, 154, 156, 255), 1)
        return f"{int(look[2] * 9) + 1}0"
    if look[0] > 0.3:  # a tantalum capacitor: a bar marks the positive end
        _block(sprite, cap * 0.5, 0, w - cap * 0.5, h, (44, 158, 226))
        _block(sprite, cap * 0.5, 0, cap * 1.3, h, (30, 70, 120))
        return f"{int(look[2] * 90) + 10}"
    _block(sprite, cap, 0, w - cap, h, (104, 142, 168))
    return ""


def _paint_ic(sprite: Image, part: Part) -> str:
    w, h, leg, look = part.w, part.h, _leg(part), part.look
    side = leg if _is_quad(part) else max(1, leg // 3)
    _block(sprite, side, leg, w - side, h - leg, (48, 46, 45) if look[1] < 0.8 else (62, 60, 66))
    cv2.circle(sprite, (side + leg + 1, h - 2 * leg - 2), max(1, leg // 3), (96, 96, 96, 255), -1)
    return _LABELS[int(look[2] * len(_LABELS))]


def _paint_led(sprite: Image, part: Part) -> str:
    w, h, cap = part.w, part.h, _cap(part)
    _block(sprite, cap * 0.7, 0, w - cap * 0.7, h, (222, 228, 230))
    lens = _LENSES[int(part.look[1] * len(_LENSES))]
    cv2.ellipse(sprite, (w // 2, h // 2), (round(w * 0.24), round(h * 0.36)), 0, 0, 360, (*lens, 255), -1)
    cv2.circle(sprite, (w * 4 // 9, h * 4 // 9), max(1, h // 9), (250, 250, 250, 255), -1)
    return ""


def _paint_connector(sprite: Image, part: Part) -> str:
    w, h, shell = part.w, part.h, _SHELLS[int(part.look[1] * len(_SHELLS))]
    _block(sprite, 0, 0, w, h, shell)
    _block(sprite, h * 0.16, h * 0.2, w - h * 0.16, h * 0.8, tint(shell, 0.72))
    for pin in _pins(part):
        _block(sprite, *pin, (90, 175, 215))
    return ""


def _block(sprite: Image, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
    """Paint a filled rectangle that is lit from the top left."""
    at, to = (round(x0), round(y0)), (round(x1) - 1, round(y1) - 1)
    cv2.rectangle(sprite, at, to, (*colour, 255), -1)
    cv2.line(sprite, at, (to[0], at[1]), (*tint(colour, 1.15, 14), 255))
    cv2.line(sprite, (at[0], to[1]), to, (*tint(colour, 0.7), 255))


def _engrave(sprite: Image, text: str) -> None:
    """Print text in the middle of a part, at most half as wide and 0.45 times as high as the part."""
    h, w = sprite.shape[:2]
    (wide, high), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
    font = min(w * 0.5 / wide, h * 0.45 / high)
    at = round(w / 2 - wide * font / 2), round(h / 2 + high * font / 2)
    ink = ink_on(sprite[h // 2, w // 2, :3].tolist())
    colours = np.ascontiguousarray(sprite[..., :3])  # in four channels, OpenCV 5 makes the text transparent
    cv2.putText(colours, text, at, cv2.FONT_HERSHEY_SIMPLEX, font, tint(ink, 0.85), 1, cv2.LINE_AA)
    sprite[..., :3] = colours
