"""Comparison of a candidate with the serving model: what is promoted, and what two models are measured on."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from ultralytics import YOLO

from yolov12.watch.comparison import ClassChange, compare, decide


def known(name, serving, candidate):
    return ClassChange(name, False, 10, serving, candidate)


def new(name, candidate):
    return ClassChange(name, True, 10, None, candidate)


def test_a_candidate_that_knows_more_and_forgets_nothing_is_promoted():
    verdict = decide([known("ic", 0.7, 0.69), known("led", 0.6, 0.61), new("crack", 0.55)], 0.02)
    assert verdict.promote
    assert verdict.reasons == (
        "No known class fell by more than the margin of 0.02. The largest fall is that of ic, from 0.700 to 0.690.",
        "crack is new and has 0.550.",
        "The mean over 3 classes rose from 0.433 to 0.617.",
    )
    assert verdict.classes[2].name == "crack"


def test_a_class_that_fell_by_more_than_the_margin_is_named_with_its_numbers():
    rows = [known("led", 0.5, 0.47), known("crack", 0.612, 0.431), known("ic", 0.5, 0.99), new("dent", 0.9)]
    verdict = decide(rows, 0.02)
    assert not verdict.promote
    assert verdict.reasons == (
        "crack fell from 0.612 to 0.431, more than the margin of 0.02.",
        "led fell from 0.500 to 0.470, more than the margin of 0.02.",
    )


def test_many_small_falls_are_not_promoted():
    verdict = decide([known("ic", 0.5, 0.49), known("led", 0.5, 0.49)], 0.02)
    assert not verdict.promote
    assert verdict.reasons == ("The mean over 2 classes fell from 0.500 to 0.490.",)


@pytest.mark.parametrize(
    ("rows", "promote"),
    [
        ([known("ic", 0.5, 0.5)], True),  # the same
        ([known("ic", 0.612, 0.592), new("crack", 0.1)], True),  # exactly the margin
        ([known("ic", 0.5, math.nan), new("crack", 0.9)], False),
        ([known("ic", 0.5, 0.5), new("crack", math.nan)], False),
        ([known("ic", None, None), new("crack", 0.9)], False),  # nothing shows that ic is as good
        ([known("rare", None, None), known("ic", 0.5, 0.5), ClassChange("crack", True, 0, None, None)], True),
        ([new("crack", 0.1)], True),  # the serving model knows no class of these names
        ([], False),
    ],
)
def test_edges(rows, promote):
    assert decide(rows, 0.02).promote is promote


def test_control_characters_of_a_name_are_not_printed():
    verdict = decide([known("a\x1b[2K", 0.5, 0.1)], 0.02)
    assert verdict.reasons[0].startswith("a\\x1b[2K fell")


@pytest.fixture(scope="module")
def line(tmp_path_factory, tiny_model):
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
    change(yolo, folder / "serving.pt", ["even", "odd"], [0, 1], factor=6)
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


def change(yolo, target, names, rows, factor=1.0):
    """Save a model with its classification rows in another order, and with scaled weights of them."""
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


def test_models_and_data_with_other_class_ids_are_compared_by_name(line, tmp_path):
    serving, old = line / "serving.pt", line / "data.yaml"
    new_data = tmp_path / "new.yaml"  # of the same images, but `even` is a new class there
    new_data.write_text(yaml.safe_dump({**yaml.safe_load(old.read_text()), "names": {0: "new", 1: "odd", 2: "none"}}))
    val_args = {"imgsz": 64, "batch": 4, "device": "cpu", "workers": 0, "rect": False, "mem_limit": "8GiB"}

    candidate = change(YOLO(str(serving)), tmp_path / "candidate.pt", ["odd", "new", "Even", "none"], [1, 0, 0, 1])
    verdict = compare(serving, candidate, old, new_data, 0.02, val_args=val_args)
    assert [(row.name, row.is_new, row.objects > 0) for row in verdict.classes] == [
        ("even", False, True),
        ("odd", False, True),
        ("new", True, True),
        ("none", True, False),
    ]
    even, odd, new_class, none = verdict.classes
    assert even.serving > 0.5
    assert odd.serving > 0.5
    assert odd.candidate == pytest.approx(odd.serving, abs=0.01)
    assert even.candidate == pytest.approx(even.serving, abs=0.01)
    assert new_class.candidate == pytest.approx(even.serving, abs=0.01)
    assert none.candidate is None
    assert verdict.promote

    worse = change(YOLO(str(serving)), tmp_path / "worse.pt", ["even", "new"], [0, 1], factor=-1.0)
    verdict = compare(serving, worse, old, new_data, 0.02, val_args=val_args)
    assert not verdict.promote
    assert f"odd fell from {odd.serving:.3f} to 0.000, more than the margin of 0.02." in verdict.reasons
    assert verdict.classes[0].candidate < 0.5
