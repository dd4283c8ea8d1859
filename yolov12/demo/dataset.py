"""The demo data set on disk: what `data=demo:...` asks for, and writing it as an ordinary YOLO data set.

How many objects an image holds is skewed on purpose: the memory a detector needs in training follows the
number of labels in a batch, and a data set of equally full images would never show a memory peak. Ordinary
boards hold about 5 to 45 objects (log-normal, median about 15). In every block of 20 images one is a panel
of 150 to 330: 5 % of the images carry about 40 % of the labels.

An image depends on the seed and its own index alone, so a larger data set begins with the smaller one. Bytes
are the same on every run with the same NumPy and OpenCV.
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

from yolov12.demo.board import Box, DrawConfig, class_names
from yolov12.demo.draw import draw_board
from yolov12.errors import ConfigError, DataError

GENERATOR_VERSION = 1  # part of the folder name: raise it when any pixel or label changes
_DENSE_EVERY = 20
_JPEG_QUALITY = 92

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoSpec:
    """What to draw. The defaults draw in a few seconds and train YOLOv12-N in minutes on two CPU cores.

    160 images put over a hundred missing, shifted and cracked parts in the training split. 320 pixels is where
    the parts of a panel, 12 by 7 pixels, are still told apart, at a quarter of the work of 640.
    """

    images: int = 160
    """Number of images, both splits together."""
    seed: int = 0
    """Another seed, other boards."""
    imgsz: int = 320
    """Side of the square images in pixels."""
    val: float = 0.2
    """Fraction of the images in the validation split, spread evenly over the indices."""
    hold_back: bool = False
    """Leave out the last two defect classes; adding them later keeps the ids of the others."""

    @property
    def folder(self) -> str:
        """Name of the data set's folder; different specs and generator versions never share one."""
        held = "-hold" if self.hold_back else ""
        return f"yolov12-demo-v{GENERATOR_VERSION}-{self.images}-{self.imgsz}-s{self.seed}-val{self.val!r}{held}"

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; the position is the class id."""
        return class_names(self.hold_back)


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# key: how to read it, what is allowed, and that in words
_RULES: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {
    "images": (int, lambda n: 2 <= n <= 100_000, "a whole number from 2 to 100000"),
    "seed": (int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2147483647"),
    "imgsz": (int, lambda n: 256 <= n <= 2048, "a whole number of pixels from 256 to 2048"),
    "val": (float, lambda x: 0 < x < 1, "a fraction between 0 and 1, such as 0.2"),
    "hold_back": (_boolean, lambda _: True, "True or False"),
}


def is_demo(data: object) -> bool:
    """Whether `data` names the embedded data set: "demo", or "demo:" and settings."""
    return isinstance(data, str) and (data == "demo" or data.startswith("demo:"))


def parse(spec: str) -> DemoSpec:
    """Read "demo" or "demo:images=2000,seed=1,hold_back=True,imgsz=640,val=0.2" (any keys, any order).

    Raises ConfigError for anything else, naming what is valid.
    """
    if not is_demo(spec):
        raise ConfigError(f"data={spec!r} is not the embedded data set; write demo or demo:images=160,seed=0")
    settings: dict[str, Any] = {}
    for item in filter(None, spec.partition(":")[2].split(",")):
        key, _, text = (piece.strip() for piece in item.partition("="))
        if key not in _RULES:
            near = difflib.get_close_matches(key, _RULES, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"data=demo has no setting {key!r}{hint}; valid: {', '.join(_RULES)}")
        if key in settings:
            raise ConfigError(f"data=demo: {key} is given twice; give it once")
        read, allowed, words = _RULES[key]
        try:
            settings[key] = read(text)
        except (ValueError, KeyError):
            raise ConfigError(f"data=demo: {key}={text!r} must be {words}") from None
        if not allowed(settings[key]):
            raise ConfigError(f"data=demo: {key}={text} must be {words}")
    demo = DemoSpec(**settings)
    if int(demo.images * demo.val) == 0:
        raise ConfigError(
            f"data=demo: val={demo.val} of {demo.images} images leaves none for validation; "
            f"use images={math.ceil(1 / demo.val)} or more, or a larger val"
        )
    return demo


def ensure(spec: str, root: Path) -> Path:
    """Path of the data.yaml of the data set that `spec` asks for; drawn under `root` on first use.

    The data set appears whole or not at all: it is drawn in a hidden folder beside its place and renamed.
    Of two processes that draw it at the same time, one's copy stays and both use it. data.yaml names no
    `path`, which Ultralytics reads as "where this file is": the folder may be moved or mounted elsewhere.

    Raises ConfigError (spec), DataError (something else has the folder's name), OSError (disk).
    """
    demo = parse(spec)
    folder = root / demo.folder
    data_yaml = folder / "data.yaml"
    if data_yaml.is_file():
        return data_yaml
    partial = root / f".{demo.folder}.{uuid.uuid4().hex[:12]}.partial"
    _log.info("drawing %d images of %d pixels into %s", demo.images, demo.imgsz, folder)
    try:
        _write(demo, partial)
        os.rename(partial, folder)  # noqa: PTH104  (the one step that must be atomic, said plainly)
    except OSError:
        if not folder.exists():
            raise
        if not data_yaml.is_file():
            raise DataError(f"{folder} exists but holds no data.yaml; remove it and run again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return data_yaml


def _write(demo: DemoSpec, folder: Path) -> None:
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
    for index in range(demo.images):
        # Evenly spread, and decided without the total, so that no image changes split as a data set grows.
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
    # Steps of 7 visit every place of a block in turn, so the panels do not all fall into one split.
    block, place = divmod(index, _DENSE_EVERY)
    return place == (seed + 7 * block) % _DENSE_EVERY


def _label_line(box: Box, imgsz: int) -> str:
    """YOLO's "class centre-x centre-y width height", as fractions of the image."""
    centre_x, centre_y = (box.x0 + box.x1) / 2 / imgsz, (box.y0 + box.y1) / 2 / imgsz
    width, height = (box.x1 - box.x0) / imgsz, (box.y1 - box.y0) / imgsz
    return f"{box.class_id} {centre_x:.6f} {centre_y:.6f} {width:.6f} {height:.6f}\n"


def _spec_of(demo: DemoSpec) -> str:
    """The spec that `parse` reads back to `demo`."""
    return "demo:" + ",".join(f"{field.name}={getattr(demo, field.name)}" for field in fields(demo))
