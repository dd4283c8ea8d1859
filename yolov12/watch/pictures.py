"""Pictures of an attempt: what the candidate finds in new images and the serving model does not, side by side.

The colours are those of Okabe and Ito, as in memory.png, and lines differ in width and style as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov12 import files
from yolov12.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Found", "Picture", "draw", "only_in", "overlap", "save"]

_ORANGE, _VERMILION, _SKY = "#E69F00", "#D55E00", "#56B4E9"
_IMAGES = 48  # most images that the models look at
_PICTURES = 4
_LABELS = 25  # most boxes of a picture that get their name and confidence
_PATTERN = "found-{}.png"
_SAME_PLACE = 0.5  # least overlap (intersection over union) of two boxes of one object

_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """One object that a model found in an image."""

    name: str
    confidence: float
    box: _Box
    """Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture that was written."""

    file: str
    """Name of the file in the folder of the report."""
    image: str
    """Name of the image that it shows."""
    gained: Mapping[str, int]
    """Class → number of objects that only the candidate finds in it."""
    missed: Mapping[str, int]
    """Class → number of objects that only the serving model finds in it."""


def save(
    folder: Path, serving: Path, candidate: Path, images: Sequence[Path], settings: Mapping[str, Any]
) -> list[Picture]:
    """Write pictures of the images in which the candidate finds most that the serving model does not.

    Pictures of an earlier call are replaced.

    Args:
        folder: Folder for the pictures.
        serving: Weights of the serving model.
        candidate: Weights of the candidate.
        images: New images. Of many, some are looked at, spread over all.
        settings: Arguments of Ultralytics' `predict`, such as `imgsz`, `device` and `mem_limit`.

    Returns:
        The pictures, most changed first. There is none if the models find the same.
    """
    from ultralytics import YOLO

    from yolov12.training.classes.names import match

    old, new = YOLO(str(serving)), YOLO(str(candidate))
    counterparts = match(old.names, new.names)
    names = {index: old.names.get(counterparts[index], name) for index, name in new.names.items()}
    changed = []
    for place, image in enumerate(_spread(images)):
        before = _find(old, old.names, image, settings)
        after = _find(new, names, image, settings)
        gained, missed = only_in(after, before), only_in(before, after)
        if gained:
            changed.append((-len(gained), place, image, before, after))
    pictures = []
    for number, (_, _, image, before, after) in enumerate(sorted(changed)[:_PICTURES], 1):
        file = folder / _PATTERN.format(number)
        with files.replacing(file) as unfinished:
            draw(image, before, after).savefig(unfinished, format="png")
        gained, missed = only_in(after, before), only_in(before, after)
        pictures.append(Picture(file.name, image.name, _counts(gained), _counts(missed)))
    for file in folder.glob(_PATTERN.format("*")):
        if file.name not in {picture.file for picture in pictures}:
            file.unlink()
    return pictures


def only_in(these: Sequence[Found], those: Sequence[Found]) -> list[Found]:
    """Return the objects that one model found and the other did not.

    Two boxes are of the same object if their class is the same and they overlap by half or more. Each box has one
    counterpart at most; the most confident boxes choose first.

    Args:
        these: What the one model found.
        those: What the other model found.
    """
    free, alone = list(those), []
    for found in sorted(these, key=lambda each: -each.confidence):
        same = [other for other in free if other.name == found.name]
        best = max(same, key=lambda other: overlap(found.box, other.box), default=None)
        if best is not None and overlap(found.box, best.box) >= _SAME_PLACE:
            free.remove(best)
        else:
            alone.append(found)
    return alone


def overlap(a: _Box, b: _Box) -> float:
    """Return the intersection over union of two boxes.

    Args:
        a: Left, top, right and bottom.
        b: The same.
    """
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (_area(a) + _area(b) - width * height)


def draw(image: Path, serving: Sequence[Found], candidate: Sequence[Found]) -> Figure:
    """Draw an image twice: with what the serving model finds, and with what the candidate finds.

    Args:
        image: An image file.
        serving: Objects that the serving model found.
        candidate: Objects that the candidate found, with the serving model's names for its classes.
    """
    import cv2

    # Not pyplot, which keeps every figure alive and selects a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = ("serving model", "--", _VERMILION), ("candidate", "-", _ORANGE)
    figure = Figure(figsize=(12, 6.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    pixels = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
    missed, gained = only_in(serving, candidate), only_in(candidate, serving)
    for place, ((title, style, colour), every, alone) in enumerate(
        zip(kinds, (serving, candidate), (missed, gained), strict=True), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        axes.imshow(pixels)
        axes.set_axis_off()
        axes.set_title(f"{title}: {len(every)} found")
        for found in every:
            if found not in alone:
                _outline(axes, found, _SKY, "-", 1.0)
        for number, found in enumerate(alone):
            _outline(axes, found, colour, style, 2.5, None if number else f"only the {title} finds it")
            if number < _LABELS:
                _name(axes, found, colour)
    handles = [handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(printable(image.name), parse_math=False)
    return figure


def _outline(axes: Axes, found: Found, colour: str, style: str, width: float, label: str | None = None) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = found.box
    axes.add_patch(
        Rectangle(
            (left, top),
            right - left,
            bottom - top,
            fill=False,
            edgecolor=colour,
            linestyle=style,
            linewidth=width,
            label=label,
        )
    )


def _name(axes: Axes, found: Found, colour: str) -> None:
    left, top = found.box[:2]
    axes.text(
        left,
        top,
        f"{printable(found.name)} {found.confidence:.0%}",
        color="black",
        fontsize=8,
        verticalalignment="bottom",
        parse_math=False,  # a name may contain dollar signs
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
    )


def _find(yolo: Any, names: Mapping[int, str], image: Path, settings: Mapping[str, Any]) -> list[Found]:
    quiet = {"verbose": False, "save": False, "save_txt": False}
    (result,) = yolo.predict(str(image), **{**settings, **quiet})
    boxes = result.boxes if result.boxes is not None else result.obb
    rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
    return [Found(names[int(index)], confidence, tuple(box)) for index, confidence, box in rows]


def _spread(images: Sequence[Path]) -> list[Path]:
    there = [image for image in images if image.is_file()]
    step = max(len(there) / _IMAGES, 1)
    return [there[int(place * step)] for place in range(min(len(there), _IMAGES))]


def _counts(found: Sequence[Found]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in found:
        counts[each.name] = counts.get(each.name, 0) + 1
    return counts


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
