"""Fixtures of the tests of the watch, such as models of a line that find something without a training."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from ultralytics import YOLO

from tests.watch.factory import Factory


@pytest.fixture(autouse=True)
def _files_are_not_flushed(monkeypatch):
    """Leave out what only matters for a power loss, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def factory(tmp_path):
    return Factory(tmp_path)


@pytest.fixture(scope="session")
def line(tmp_path_factory, tiny_model, change_rows):
    """Folder with a model of two classes and data in which it finds everything: the labels are what it finds."""
    folder = tmp_path_factory.mktemp("line")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    for index, image in enumerate(images):
        cv2.imwrite(str(folder / "images" / f"{index}.png"), image)
    torch.manual_seed(1)
    yolo = YOLO(tiny_model)
    for module in yolo.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        yolo.model.train()(torch.tensor(images).permute(0, 3, 1, 2) / 255)  # now features depend on the image
    yolo.model.eval()
    for branch in yolo.model.model[-1].cv2:
        branch[-1].bias.data = -torch.arange(16.0).repeat(4)  # small boxes
    change_rows(yolo, folder / "serving.pt", ["even", "odd"], [0, 1], factor=6)
    settings = {"imgsz": 64, "conf": 0.001, "iou": 0.3, "device": "cpu", "verbose": False, "stream": True}
    for found in YOLO(str(folder / "serving.pt")).predict(str(folder / "images"), **settings):
        boxes = found.boxes.xywhn.tolist()
        lines = [
            f"{index} {' '.join(map(str, boxes[place]))}\n"
            for index in (0, 1)
            for place in (found.boxes.cls == index).nonzero().flatten().tolist()[:3]
        ]
        (folder / "labels" / Path(found.path).with_suffix(".txt").name).write_text("".join(lines))
    data = {"path": str(folder), "train": "images", "val": "images", "names": {0: "even", 1: "odd"}}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    return folder


@pytest.fixture(scope="session")
def change_rows():
    """Save a model with its classification rows in another order, and with scaled weights of them."""
    return _change_rows


def _change_rows(yolo, target, names, rows, factor=1.0):
    head = yolo.model.model[-1]
    for branch in head.cv3:
        old = branch[-1]
        branch[-1] = torch.nn.Conv2d(old.in_channels, len(rows), 1)
        branch[-1].weight.data = old.weight.data[rows] * factor
        branch[-1].bias.data = old.bias.data[rows]
    head.nc, head.no = len(rows), len(rows) + head.reg_max * 4
    yolo.model.names = dict(enumerate(names))
    yolo.model.nc = len(rows)
    yolo.save(target)
    return target
