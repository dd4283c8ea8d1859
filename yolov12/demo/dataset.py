"""Parses `data=demo:...` and writes the demo data set as an ordinary YOLO data set.

The number of objects per image is skewed on purpose. The memory that a detector needs in training grows with the number
of labels in a batch, and images with equally many labels would never show a memory peak. An ordinary board has about 5
to 45 objects (log-normal, median about 15). One image in every 20 is a panel with 150 to 330 objects, so 5 % of the
images have about 40 % of the labels.

An image depends only on the seed and its own index, so the images of a small data set are also the first images of a
larger one. With the same NumPy and OpenCV, every run writes the same bytes.
"""

import difflib
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from yolov12.demo.board import DEFECTS, HELD_BACK, Box, DrawConfig, class_names
from yolov12.demo.draw import draw_board
from yolov12.errors import ConfigError, DataError

GENERATOR_VERSION = 2  # part of the folder name: increase it if any pixel or label changes
_DENSE_EVERY = 20
_JPEG_QUALITY = 92

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoSpec:
    """Settings of the data set. The defaults are drawn in seconds and train YOLOv12-N in minutes on two CPU cores.

    With 160 images, the training split has more than a hundred missing, shifted and cracked parts. At 320 pixels, the
    parts of a panel are 12 by 7 pixels and can still be recognised, and an image costs a quarter of one at 640 pixels.
    """

    images: int = 160
    """Number of images in both splits together."""
    seed: int = 0
    """Seed of the random choices. Another seed gives other boards."""
    imgsz: int = 320
    """Side of the square images in pixels."""
    val: float = 0.2
    """Fraction of the images in the validation split. They are spread evenly over the indices."""
    hold_back: tuple[str, ...] = ()
    """Defect classes to leave out. Adding the last two later changes no other class id."""

    @property
    def folder(self) -> str:
        """Name of the folder. Different settings and generator versions have different folders."""
        held = "-hold" if self.hold_back else ""
        held += "" if self.hold_back == HELD_BACK else "".join(f"-{name}" for name in self.hold_back)
        return f"yolov12-demo-v{GENERATOR_VERSION}-{self.images}-{self.imgsz}-s{self.seed}-val{self.val!r}{held}"

    @property
    def names(self) -> tuple[str, ...]:
        """Class names. The position of a name is its class id."""
        return class_names(self.hold_back)


def _held_back(text: str) -> tuple[str, ...]:
    if text.lower() in ("true", "false"):
        return HELD_BACK if text.lower() == "true" else ()
    names = text.split("+")
    if not set(names) <= set(DEFECTS):
        raise ValueError(text)
    return tuple(name for name in DEFECTS if name in names)


# setting → parser, check, and the allowed values in words
_RULES: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {
    "images": (int, lambda n: 2 <= n <= 100_000, "a whole number from 2 to 100000"),
    "seed": (int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2147483647"),
    "imgsz": (int, lambda n: 256 <= n <= 2048, "a whole number of pixels from 256 to 2048"),
    "val": (float, lambda x: 0 < x < 1, "a fraction between 0 and 1, such as 0.2"),
    "hold_back": (_held_back, lambda _: True, f"True, False, or defects joined by +, of {', '.join(DEFECTS)}"),
}


def is_demo(data: object) -> bool:
    """Return True if `data` names the embedded data set: "demo", or "demo:" and settings."""
    return isinstance(data, str) and (data == "demo" or data.startswith("demo:"))


def parse(spec: str, argument: str = "data") -> DemoSpec:
    """Parse the name of a demo data set.

    Args:
        spec: "demo", or "demo:" and settings in any order, as in "demo:images=2000,seed=1,hold_back=True".
        argument: The argument that it is the value of, for errors.

    Returns:
        The settings. Those that are not given have their defaults.

    Raises:
        ConfigError: The text is malformed, or a setting is unknown or out of range. The message lists what is valid.
    """
    if not is_demo(spec):
        raise ConfigError(f"{argument}={spec!r} is not the embedded data set. Write demo or demo:images=160,seed=0")
    settings: dict[str, Any] = {}
    for item in filter(None, spec.partition(":")[2].split(",")):
        key, _, text = (piece.strip() for piece in item.partition("="))
        if key not in _RULES:
            near = difflib.get_close_matches(key, _RULES, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{argument}=demo has no setting {key!r}{hint}; valid: {', '.join(_RULES)}")
        if key in settings:
            raise ConfigError(f"{argument}=demo: {key} is given twice. Give it once")
        read, allowed, words = _RULES[key]
        try:
            settings[key] = read(text)
        except ValueError:
            raise ConfigError(f"{argument}=demo: {key}={text!r} must be {words}") from None
        if not allowed(settings[key]):
            raise ConfigError(f"{argument}=demo: {key}={text} must be {words}")
    demo = DemoSpec(**settings)
    if int(demo.images * demo.val) == 0:
        raise ConfigError(
            f"{argument}=demo: val={demo.val} of {demo.images} images leaves none for validation. "
            f"Give images={math.ceil(1 / demo.val)} or more, or a larger val"
        )
    return demo


def ensure(spec: str, root: Path, argument: str = "data") -> Path:
    """Return the data.yaml of a demo data set. If the data set does not exist, draw it.

    The data set is drawn in a hidden folder, which is then renamed, so it is never incomplete. If two processes draw it
    at the same time, one copy stays and both use it. The data.yaml has no `path`, so Ultralytics looks beside it: the
    folder may be moved or mounted elsewhere.

    Args:
        spec: The name that `parse` reads.
        root: The folder that holds data sets.
        argument: The argument that `spec` is the value of, for errors.

    Returns:
        The path of the data.yaml.

    Raises:
        ConfigError: The name is not valid.
        DataError: Something else has the name of the data set's folder.
        OSError: The data set cannot be written.
    """
    demo = parse(spec, argument)
    folder = root / demo.folder
    data_yaml = folder / "data.yaml"
    if data_yaml.is_file():
        return data_yaml
    partial = root / f".{demo.folder}.{uuid.uuid4().hex[:12]}.partial"
    _log.info("drawing %d images of %d pixels into %s", demo.images, demo.imgsz, folder)
    try:
        _write(demo, partial)
        os.rename(partial, folder)  # noqa: PTH104  (plain os.rename: this step must be atomic)
    except OSError:
        if not folder.exists():
            raise
        if not data_yaml.is_file():
            raise DataError(f"{folder} exists but has no data.yaml. Remove it and run again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return data_yaml


def _write(demo: DemoSpec, folder: Path) -> None:
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
    for index in range(demo.images):
        # Spread evenly, and independent of the total: no image changes its split if the data set grows.
        split = "val" if int((index + 1) * demo.val) > int(index * demo.val) else "train"
        config = DrawConfig(demo.imgsz, _is_dense(demo.seed, index), demo.hold_back)
        image, boxes = draw_board(np.random.default_rng([demo.seed, index]), config)
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        (folder / "images" / split / f"{index:06d}.jpg").write_bytes(jpeg.tobytes())
        lines = "".join(_label_line(box, demo.imgsz) for box in boxes)
        (folder / "labels" / split / f"{index:06d}.txt").write_text(lines)
    about = {"train": "images/train", "val": "images/val", "names": dict(enumerate(demo.names))}
    comment = f"# Drawn by yolov12 (generator {GENERATOR_VERSION}): {_spec_of(demo)}\n"
    (folder / "data.yaml").write_text(comment + yaml.safe_dump(about, sort_keys=False))


def _is_dense(seed: int, index: int) -> bool:
    # The place of the panel advances by 7 from block to block, so that panels occur in both splits.
    block, place = divmod(index, _DENSE_EVERY)
    return place == (seed + 7 * block) % _DENSE_EVERY


def _label_line(box: Box, imgsz: int) -> str:
    """Format "class centre-x centre-y width height", as fractions of the image."""
    centre_x, centre_y = (box.x0 + box.x1) / 2 / imgsz, (box.y0 + box.y1) / 2 / imgsz
    width, height = (box.x1 - box.x0) / imgsz, (box.y1 - box.y0) / imgsz
    return f"{box.class_id} {centre_x:.6f} {centre_y:.6f} {width:.6f} {height:.6f}\n"


def _spec_of(demo: DemoSpec) -> str:
    """Format the settings as a text that `parse` reads."""
    values = {field.name: getattr(demo, field.name) for field in fields(demo)}
    values["hold_back"] = "+".join(demo.hold_back) or False
    return "demo:" + ",".join(f"{name}={value}" for name, value in values.items())
