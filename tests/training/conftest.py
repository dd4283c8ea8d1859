"""Helpers for tests of whole trainings: run one, and collect everything that a user could see of it."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision  # noqa: F401 - or each worker of a loader would spend half a second on it
import yaml
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from ultralytics import YOLO
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER
from ultralytics.utils.callbacks import default_callbacks
from ultralytics.utils.torch_utils import unwrap_model

from yolov12.training.data.loader import resumable
from yolov12.training.data.places import Order, Start, boxes_of, by_place

IMAGES = 32  # number of images in the training split
BATCHES = 4  # number of batches per epoch, of 8 images each
_DATA = {"data": "demo:images=40,val=0.2", "imgsz": 64, "batch": 8, "nbs": 8, "workers": 0, "close_mosaic": 0}
_TRAINING = {"epochs": 2, "optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0, "recipe": False}
TINY: Mapping[str, Any] = {**_DATA, **_TRAINING, "plots": False, "device": "cpu"}
SPLIT: Mapping[str, Any] = {"bn_group": 2, "micro_batch": 2}
"""Arguments that split each batch into four micro-batches."""


@dataclass
class Run:
    """Outcome of one training."""

    folder: Path = Path()
    trainer: Any = None
    log: str = ""
    bar: str = ""
    """Text of the progress bars."""
    seen: list[tuple[int, int, int]] = field(default_factory=list)
    """Number of images, height and width of each part that the model was trained on, in order."""
    sums: list[float] = field(default_factory=list)
    """Sum of the pixels of each of these images."""
    ahead: list[int] = field(default_factory=list)
    """Number of images in each part that ran without gradients, in order."""
    draws: list[Any] = field(default_factory=list)
    """State of Python's random generator after each batch."""
    calls: Counter[str] = field(default_factory=Counter)
    """Callback → number of calls."""
    steps: int = 0
    """Number of optimizer steps."""
    before: dict[str, Tensor] = field(default_factory=dict)
    """Weights and statistics before the first batch."""

    @property
    def memory(self) -> list[dict[str, str]]:
        """Rows of memory.csv."""
        return list(csv.DictReader((self.folder / "memory.csv").read_text().splitlines()))

    @property
    def results(self) -> list[dict[str, float]]:
        """Rows of results.csv, with a number in every column."""
        header, *rows = csv.reader((self.folder / "results.csv").read_text().splitlines())
        return [dict(zip(header, map(float, row), strict=True)) for row in rows]

    @property
    def summary(self) -> dict[str, Any]:
        """Content of memory.json."""
        return json.loads((self.folder / "memory.json").read_text())

    @property
    def args(self) -> dict[str, Any]:
        """Content of args.yaml."""
        return yaml.safe_load((self.folder / "args.yaml").read_text())

    @property
    def after(self) -> dict[str, Tensor]:
        """Weights and statistics after the last batch, in full precision."""
        return unwrap_model(self.trainer.model).state_dict()

    def stock_results(self) -> list[dict[str, float]]:
        """Rows of results.csv without the columns of time and memory."""
        return [{k: v for k, v in row.items() if k != "time" and not k.startswith("memory/")} for row in self.results]

    def batches(self, images: int) -> list[list[float]]:
        """Sums of pixels of each batch, sorted, as images may share micro-batches in any order."""
        return [sorted(self.sums[start : start + images]) for start in range(0, len(self.sums), images)]

    def micro_batches(self) -> list[list[int]]:
        """Sizes of the micro-batches of every update."""
        return [[int(size) for size in row["micro_batches"].split()] for row in self.memory]

    def start(self, trainer: Any) -> None:
        """Copy the weights before the first batch; callback of `on_train_start`."""
        self.trainer, self.folder = trainer, trainer.save_dir
        self.before = {name: value.clone() for name, value in unwrap_model(trainer.model).state_dict().items()}
        trainer.optimizer.register_step_post_hook(self._count)

    def look(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Note the images of a forward pass; hook of all modules, as a hook on the model would be saved with it."""
        ours = self.trainer is not None and module.training and module is unwrap_model(self.trainer.model)
        if ours and isinstance(inputs[0], dict):
            images = inputs[0]["img"]
            if not torch.is_grad_enabled():
                self.ahead.append(len(images))
                return
            self.seen.append((len(images), *images.shape[2:]))
            self.sums.extend(images.double().sum((1, 2, 3)).tolist())

    def _count(self, *_: Any) -> None:
        self.steps += 1


def train(
    project: Path,
    model: Any,
    *,
    trainer: Any = None,
    callbacks: Sequence[tuple[str, Callable[[Any], None]]] = (),
    raises: type[BaseException] | None = None,
    draws_by_place: bool = True,
    **arguments: Any,
) -> Run:
    """Train with Ultralytics' arguments, by default `TINY`; None stands for Ultralytics' own default.

    With `mas=False`, Ultralytics trains, with the random draws of a training with the engine if `draws_by_place`.
    """
    run = Run()
    yolo = model if isinstance(model, Model) else YOLO(model)
    for event in default_callbacks:
        yolo.add_callback(event, lambda trainer, event=event: run.calls.update([event]))
    yolo.add_callback("on_pretrain_routine_start", lambda trainer: setattr(run, "folder", trainer.save_dir))
    if draws_by_place:
        yolo.add_callback("on_pretrain_routine_end", train_by_place)
    yolo.add_callback("on_train_start", run.start)
    yolo.add_callback("on_train_batch_end", lambda trainer: run.draws.append(random.getstate()))
    for event, callback in callbacks:
        yolo.add_callback(event, callback)
    where = {} if arguments.get("resume") is True else {"project": project}
    settings = {**({} if arguments.get("resume") else TINY), **where, **arguments}
    bar, log = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    LOGGER.addHandler(handler)
    looking = register_module_forward_pre_hook(run.look)
    try:
        with contextlib.redirect_stdout(bar), pytest.raises(raises) if raises else contextlib.nullcontext():
            yolo.train(trainer=trainer, **{k: v for k, v in settings.items() if v is not None})
    finally:
        LOGGER.removeHandler(handler)
        looking.remove()
        run.log, run.bar = log.getvalue(), bar.getvalue()
    return run


def train_by_place(trainer: Any) -> None:
    """Let Ultralytics' own training draw what depends on the place of an image or a batch from it, as ours does."""
    if trainer.args.mas or not resumable(trainer.train_loader):
        return
    order = draw_by_place(trainer.train_loader, trainer.start_epoch)
    stock, batches = trainer.preprocess_batch, itertools.count(trainer.start_epoch * len(order))

    def preprocess_batch(batch: Any) -> Any:
        epoch, number = divmod(next(batches), len(order))
        if trainer.args.multi_scale > 0:
            random.seed(order.seed(Start(torch.empty(0), epoch, number)))
        return stock(batch)

    trainer.preprocess_batch = preprocess_batch


def draw_by_place(loader: Any, epoch: int = 0) -> Order:
    """Let Ultralytics' own loader augment each image from the seed and with the pool of its place; return its order."""
    dataset = loader.dataset
    order = Order(loader.batch_sampler.sampler, loader.generator, boxes_of(dataset), epoch)
    loader.batch_sampler.sampler = order
    dataset.__getitems__ = lambda indices: by_place(dataset, indices, dataset.__getitem__)
    return order


def draw_data(folder: Path, task: str = "detect", sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> str:
    """Draw 8 images of each size (height, width), bright rectangles on noise, labelled for a task; return the yaml."""
    draw = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index in range(8 * len(sizes)):
        height, width = sizes[index % len(sizes)]
        image = draw.integers(0, 80, (height, width, 3), dtype=np.uint8)
        lines = []
        for _ in range(1 + index % 3):
            x, y = draw.uniform(0.3, 0.7, 2)
            w, h = draw.uniform(0.2, 0.4, 2)
            left, top, right, bottom = x - w / 2, y - h / 2, x + w / 2, y + h / 2
            image[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 255
            box = f"{x} {y} {w} {h}"
            corners = f"{left} {top} {right} {top} {right} {bottom} {left} {bottom}"
            points = f"{box} {left} {top} 2 {right} {bottom} 2"
            label = {"detect": box, "segment": corners, "obb": corners, "pose": points}[task]
            lines.append(f"{index % 2} {label}")
        cv2.imwrite(str(folder / "images" / f"{index}.png"), image)
        (folder / "labels" / f"{index}.txt").write_text("\n".join(lines))
    data = {"path": str(folder), "train": "images", "val": "images", "names": {0: "even", 1: "odd"}}
    if task == "pose":
        data |= {"kpt_shape": [2, 3], "flip_idx": [0, 1]}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "data.yaml")


@pytest.fixture(scope="session")
def trainings(tiny_model: str) -> SimpleNamespace:
    """Return the helpers of this module."""

    def train_any(project: Path, model: Any = tiny_model, **arguments: Any) -> Run:
        return train(project, model, **arguments)

    return SimpleNamespace(
        draw_by_place=draw_by_place,
        train=train_any,
        TINY=TINY,
        SPLIT=SPLIT,
        IMAGES=IMAGES,
        BATCHES=BATCHES,
        draw_data=draw_data,
    )


@pytest.fixture(autouse=True)
def _mode_is_left_as_it_was() -> Iterator[None]:
    """Check that PyTorch's deterministic mode is off again, also after a training that failed."""
    yield
    assert not torch.are_deterministic_algorithms_enabled()
