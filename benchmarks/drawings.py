"""Data sets for the other benchmarks, drawn on all cores."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["boards", "inspection", "noise", "photographs", "shapes"]


def boards(sets: int, imgsz: int) -> str:
    """Draw the demonstration data set and return its yaml.

    Args:
        sets: Number of seeds; each has 128 images to train on.
        imgsz: Size of the images in pixels.
    """
    folder = Path(tempfile.mkdtemp())
    with multiprocessing.Pool(min(64, os.cpu_count() or 1)) as pool:
        files = pool.map(functools.partial(_boards_of, folder, imgsz), range(sets))
    names = files[0].read_text().partition("names:")[2]
    train = "".join(f"- {file.parent / 'images' / 'train'}\n" for file in files)
    file = folder / "data.yaml"
    file.write_text(f"train:\n{train}val: {files[0].parent / 'images' / 'val'}\nnames:{names}")
    return str(file)


def _boards_of(folder: Path, imgsz: int, seed: int) -> Path:
    from yolov12 import demo

    return demo.ensure(f"demo:images=160,val=0.2,imgsz={imgsz},seed={seed}", folder)


def inspection(
    folder: Path, images: int, val: int, imgsz: int, *, repeat: int = 1, seed: int = 0, hard: bool = False
) -> str:
    """Draw boards of the demonstration data set, or harder ones, and return the yaml.

    On the harder ones, every fourth board is a panel with 150 to 320 small parts, in place of every twentieth. They
    have a quarter to three fifths of the contrast, another brightness, and noise.

    Args:
        folder: Folder to make; if it exists, nothing is drawn.
        images: Number of images to train on.
        val: Number of images to validate on. None of them is trained on.
        imgsz: Size of the images in pixels.
        repeat: Number of times that an epoch has each image, so that it can be longer than the data set.
        seed: Seed of the boards.
        hard: True for the harder ones.
    """
    from yolov12.demo.board import CLASS_NAMES

    file = folder / "data.yaml"
    if file.exists():
        return str(file)
    for split, indices in (("train", range(images)), ("val", range(images, images + val))):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        with multiprocessing.Pool(min(64, os.cpu_count() or 1)) as pool:
            pool.map(functools.partial(_inspection_of, folder, split, imgsz, seed, hard), indices)
    names = "\n".join(f"  {index}: {name}" for index, name in enumerate(CLASS_NAMES))
    train = "- images/train\n" * repeat
    file.write_text(f"path: {folder.absolute()}\ntrain:\n{train}val: images/val\nnames:\n{names}\n")
    return str(file)


def _inspection_of(folder: Path, split: str, imgsz: int, seed: int, hard: bool, index: int) -> None:
    import cv2
    import numpy as np

    from yolov12.demo.board import DrawConfig
    from yolov12.demo.draw import draw_board

    draw = np.random.default_rng((3, seed, index))
    image, boxes = draw_board(draw, DrawConfig(imgsz, dense=index % (4 if hard else 20) == 0))
    if hard:
        gray = 128 + (image - np.float32(128)) * draw.uniform(0.25, 0.6) + draw.uniform(-30, 30)
        image = np.clip(gray + draw.normal(0, 10, image.shape), 0, 255).astype(np.uint8)
    cv2.imwrite(str(folder / "images" / split / f"{index}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
    lines = [
        f"{box.class_id} {(box.x0 + box.x1) / 2 / imgsz:.6f} {(box.y0 + box.y1) / 2 / imgsz:.6f} "
        f"{(box.x1 - box.x0) / imgsz:.6f} {(box.y1 - box.y0) / imgsz:.6f}"
        for box in boxes
    ]
    (folder / "labels" / split / f"{index}.txt").write_text("\n".join(lines))


def noise(images: int, *, crowded: bool = False) -> str:
    """Draw noise images of 640 pixels and return the yaml.

    Args:
        images: Number of images to train on.
        crowded: True for 300 to 900 boxes on 2 % of the images; all others have 4 to 16 boxes.
    """
    folder = Path(tempfile.mkdtemp()) / "noise"
    for split, count in (("train", images), ("val", 16)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        with multiprocessing.Pool(min(64, os.cpu_count() or 1)) as pool:
            pool.map(functools.partial(_noise_of, folder, split, crowded), range(count))
    names = "\n".join(f"  {index}: class{index}" for index in range(8))
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return str(file)


def _noise_of(folder: Path, split: str, crowded: bool, index: int) -> None:
    import cv2
    import numpy as np

    draw = np.random.default_rng((0, index))
    boxes = draw.integers(300, 901) if crowded and index % 50 == 7 else draw.integers(4, 17)
    image = np.repeat(np.repeat(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8), 16, 0), 16, 1)
    size = 0.03 if boxes > 100 else 0.15
    lines = []
    for x, y, w, h in zip(*draw.uniform(0.1, 0.9, (2, boxes)), *draw.uniform(size / 2, size, (2, boxes)), strict=True):
        lines.append(f"{draw.integers(8)} {x:.4f} {y:.4f} {w:.4f} {h:.4f}")
    cv2.imwrite(str(folder / "images" / split / f"{index}.jpg"), image)
    (folder / "labels" / split / f"{index}.txt").write_text("\n".join(lines))


def photographs(images: int, longer: int = 640) -> str:
    """Draw images with the sizes and the bytes of photographs (150 kB at 640 pixels) and return the yaml.

    Args:
        images: Number of images to train on; some of them are for validation, too.
        longer: Length of the longer side of most images, in pixels.
    """
    folder = Path(tempfile.mkdtemp())
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    with multiprocessing.Pool(min(64, os.cpu_count() or 1)) as pool:
        pool.map(functools.partial(_photograph_of, folder, longer), range(images))
    names = "\n".join(f"  {index}: class{index}" for index in range(8))
    (folder / "val.txt").write_text("".join(f"./images/{index}.jpg\n" for index in range(min(images, 16))))
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images\nval: val.txt\nnames:\n{names}\n")
    return str(file)


def _photograph_of(folder: Path, longer: int, index: int) -> None:
    import cv2
    import numpy as np

    shapes = [(0.75, 1), (0.667, 1), (1, 0.75), (0.75, 1), (1, 1), (0.586, 0.781)]  # the most frequent ones in COCO
    draw = np.random.default_rng((1, index))
    height, width = (round(side * longer) for side in shapes[index % len(shapes)])
    coarse = draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(smooth + draw.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)
    cv2.imwrite(str(folder / "images" / f"{index}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 93])
    boxes = zip(*draw.uniform(0.15, 0.85, (2, 7)), *draw.uniform(0.05, 0.3, (2, 7)), strict=True)
    lines = [f"{draw.integers(8)} {x:.4f} {y:.4f} {w:.4f} {h:.4f}" for x, y, w, h in boxes]
    (folder / "labels" / f"{index}.txt").write_text("\n".join(lines))


def shapes(images: int, val: int, imgsz: int, folder: Path | None = None, *, repeat: int = 1) -> str:
    """Draw squares, discs, triangles and crosses on noise, which a small model learns in a minute; return the yaml.

    Args:
        images: Number of images to train on.
        val: Number of images to validate on.
        imgsz: Size of the images in pixels.
        folder: Folder to make, in which nothing is drawn if it exists; without it, a new one.
        repeat: Number of times that an epoch has each image.
    """
    import cv2

    folder = folder or Path(tempfile.mkdtemp())
    file = folder / "data.yaml"
    if file.exists():
        return str(file)
    first = 0
    for split, count in (("train", images), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(first, first + count):
            image, lines = _shapes_of(imgsz, index)
            cv2.imwrite(str(folder / "images" / split / f"{index}.png"), image)
            (folder / "labels" / split / f"{index}.txt").write_text("\n".join(lines))
        first += count
    names = "  0: square\n  1: disc\n  2: triangle\n  3: cross\n"
    train = "- images/train\n" * repeat
    file.write_text(f"path: {folder.absolute()}\ntrain:\n{train}val: images/val\nnames:\n{names}")
    return str(file)


def _shapes_of(imgsz: int, index: int) -> tuple[Any, list[str]]:
    """Return an image, and the lines of its labels."""
    import cv2
    import numpy as np

    draw = np.random.default_rng((2, index))
    image = np.repeat(np.repeat(draw.integers(0, 160, (imgsz // 8, imgsz // 8, 3), dtype=np.uint8), 8, 0), 8, 1)
    lines = []
    for _ in range(draw.integers(1, 6)):
        kind, r = int(draw.integers(4)), int(draw.integers(imgsz // 12, imgsz // 6))
        x, y = (int(each) for each in draw.integers(r, imgsz - r, 2))
        color = draw.integers(100, 256, 3).tolist()
        if kind == 0:
            cv2.rectangle(image, (x - r, y - r), (x + r, y + r), color, -1)
        elif kind == 1:
            cv2.circle(image, (x, y), r, color, -1)
        elif kind == 2:
            cv2.fillPoly(image, [np.array([(x, y - r), (x - r, y + r), (x + r, y + r)])], color)
        else:
            cv2.line(image, (x - r, y), (x + r, y), color, max(r // 3, 2))
            cv2.line(image, (x, y - r), (x, y + r), color, max(r // 3, 2))
        lines.append(f"{kind} {x / imgsz:.4f} {y / imgsz:.4f} {2 * r / imgsz:.4f} {2 * r / imgsz:.4f}")
    return image, lines
