"""Sizes, settings and boards of benchmarks/line.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEW, ABSENT = ("missing", "scratch"), ("connector", "bridge")


@dataclass(frozen=True)
class Story:
    """Sizes and settings of the story."""

    base: str = ""
    """Folder of a base model that is there already; empty to train it."""
    base_images: int = 5000
    base_epochs: int = 36
    """Boards and epochs of the training of the base model."""
    old: str = f"demo:images=1000,val=0.2,hold_back={'+'.join(NEW)}"
    """Boards of the line."""
    drawn: tuple[str, ...] = tuple(f"demo:images=250,seed={seed},val=0.2" for seed in range(2, 50))
    """Boards from which those of the new product are chosen. Those in `val` are for the table alone."""
    epochs: int = 50
    close_mosaic: int = 18
    mosaic: float = 1.0
    mixup: float = 0.15
    """Probability of mixup, as in the official recipe for M and L."""
    warmup_epochs: float = 2.0
    lr0: float = 0.001
    replay_fraction: float = 0.5
    batch: int = 128
    imgsz: int = 320
    device: str = "0"
    workers: int = 8
    cache: str = "ram"
    mem_limit: str = "32GiB"
    save_every: str = "10s"
    neighbour: tuple[int, ...] = (32 << 10, 22 << 10, 26 << 10, 4)
    """Pool, least and most MiB, and seed."""
    kill_at: float = 0.3
    """Fraction of the epochs after which everything is killed."""
    kill_after_s: float = 1.5
    """Seconds after the end of that epoch, so that the next one is under way."""
    margin: float = 0.05
    """Larger than the default: rare classes (`bridge`) differ by some points from training to training."""
    damaged: int = 2
    """Number of damaged images that arrive."""
    settle: str = "1s"
    patience_s: float = 560.0

    def retraining(self) -> dict[str, Any]:
        """Return the arguments of the trainings for the new classes."""
        names = (
            *("batch", "imgsz", "device", "workers", "cache", "mem_limit"),
            *("epochs", "lr0", "warmup_epochs", "mosaic", "mixup", "close_mosaic"),
        )
        own = {name: getattr(self, name) for name in names}
        # Ultralytics' default warm-up of biases is for SGD: with AdamW it undoes what the model knows.
        return {**own, "optimizer": "AdamW", "warmup_bias_lr": 0.0, "plots": False}


SMALL = Story(
    base_images=60,
    base_epochs=1,
    old=f"demo:images=60,val=0.5,hold_back={'+'.join(NEW)}",
    drawn=("demo:images=250,seed=2,val=0.2",),
    epochs=6,
    close_mosaic=3,
    warmup_epochs=0.0,
    lr0=0.0002,
    device="cpu",
    workers=0,
    mem_limit="2GiB",
    save_every="2",
    neighbour=(0, 256, 1024, 4),
    kill_after_s=0.0,
    patience_s=1500.0,
)


def draw(story: Story, folder: Path) -> dict[str, Any]:
    """Draw all boards, each data set in a process of its own, and choose those of the new product.

    Args:
        story: Sizes and settings.
        folder: Folder for the data.

    Returns:
        `old` and `holdout`, paths of data set yamls, and `images`, those that will arrive.
    """
    import yaml

    code = "import sys, pathlib; from yolov12 import demo; print(demo.ensure(sys.argv[1], pathlib.Path(sys.argv[2])))"
    folder.mkdir(parents=True, exist_ok=True)

    def ensure(spec: str) -> Path:
        words = [sys.executable, "-c", code, spec, str(folder)]
        return Path(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        old, *drawn = pool.map(ensure, (story.old, *story.drawn))
    all_names: dict[int, str] = yaml.safe_load(drawn[0].read_text())["names"]
    ids = {name: str(index) for index, name in all_names.items()}
    for split in ("train", "val"):
        product = folder / "product" / split
        shutil.rmtree(product, ignore_errors=True)
        for kind in ("images", "labels"):
            (product / kind).mkdir(parents=True)
        for number, data in enumerate(drawn):
            for label in sorted((data.parent / "labels" / split).glob("*.txt")):
                there = {line.split()[0] for line in label.read_text().splitlines()}
                if there & {ids[name] for name in NEW} and not there & {ids[name] for name in ABSENT}:
                    stem = f"{number:02}-{label.stem}"
                    shutil.copy(label, product / "labels" / f"{stem}.txt")
                    shutil.copy(
                        data.parent / "images" / split / f"{label.stem}.jpg", product / "images" / f"{stem}.jpg"
                    )
    holdout = write_yaml(folder / "product" / "val", all_names, {"train": "images", "val": "images"})
    return {
        "old": str(old),
        "holdout": str(holdout),
        "names": list(all_names.values()),
        "images": sorted((folder / "product" / "train" / "images").iterdir()),
    }


def write_yaml(folder: Path, names: Mapping[int, str], splits: Mapping[str, str]) -> Path:
    """Write the yaml of a data set into its folder, and return its path."""
    import yaml

    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({"path": str(folder), **splits, "names": dict(names)}))
    return file
