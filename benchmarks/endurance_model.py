"""The training of benchmarks/endurance.py: a tiny detector on drawn images, in this process."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["TINY", "drawn", "training", "yaml_of"]

TINY: Mapping[str, Any] = {"model": "tiny", "imgsz": 64, "batch": 8, "nbs": 8, "epochs": 4, "bn_group": 2}
_OURS = ("bn_group", "recipe")
_OTHERS: Mapping[str, Any] = {
    "optimizer": "AdamW",
    "lr0": 1e-3,
    "warmup_epochs": 0.0,
    "close_mosaic": 0,
    "recipe": False,
    "workers": 0,
    "val": False,
    "plots": False,
    "exist_ok": True,
    "verbose": False,
}
_YAMLS = {
    "tiny": """nc: 10
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, C2f, [8, True]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 1, C2f, [16]]
  - [[3, 8, 5], 1, Detect, [nc]]
""",
    "tiniest": """nc: 10
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [[2], 1, Detect, [nc]]
""",
}


def yaml_of(model: str) -> str:
    """Return the path of a model's yaml.

    Args:
        model: `tiny` for ten small layers, `tiniest` for four, or a yaml that Ultralytics finds.
    """
    if model not in _YAMLS:
        return model
    file = Path(tempfile.mkdtemp(), f"{model}.yaml")
    file.write_text(_YAMLS[model])
    return str(file)


def drawn(images: int) -> str:
    """Draw the demonstration data set, and return its yaml, which stock Ultralytics can read, too.

    Args:
        images: Number of images to train on; eight more are for validation.
    """
    from yolov12 import demo

    return str(demo.ensure(f"demo:images={images + 8},val={8 / (images + 8)}", Path(tempfile.mkdtemp())))


def training(
    *,
    device: str,
    data: str,
    folder: Path | None = None,
    callbacks: Mapping[str, Callable[[Any], None]] | None = None,
    is_stock: bool = False,
    **arguments: Any,
) -> Path:
    """Train, and return the folder of the run.

    Args:
        device: `cpu` or `cuda`.
        data: Yaml of the data set.
        folder: Folder for the run; by default a new one.
        callbacks: Callbacks of Ultralytics by their events.
        is_stock: True to train with stock Ultralytics, in a process in which this package is not joined to it.
        arguments: Arguments of the training, with `model`.
    """
    arguments = {**_OTHERS, "data": data, **arguments}
    if is_stock:
        assert "yolov12.seams" not in sys.modules, "this package is joined to Ultralytics"
        arguments = {name: value for name, value in arguments.items() if name not in _OURS}
    else:
        from yolov12 import autopatch

        autopatch.apply()
    from ultralytics import YOLO

    model = YOLO(yaml_of(arguments.pop("model")))
    for event, callback in (callbacks or {}).items():
        model.add_callback(event, callback)
    where = folder or Path(tempfile.mkdtemp())
    model.train(device=0 if device == "cuda" else device, project=str(where), name="run", **arguments)
    return Path(model.trainer.save_dir)
