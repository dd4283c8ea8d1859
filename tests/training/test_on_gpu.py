"""Trainings on a GPU with workers: interrupted runs, and images that get smaller."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = {"device": 0, "workers": 2, "imgsz": 320, "data": "demo:images=80,val=0.2", "amp": False, "cache": "ram"}
BATCHES = 8  # number of batches per epoch, of 8 images each


class PowerCutError(Exception):
    """Power cut in the second epoch."""


def cut(trainer):
    if trainer.epoch == 1:
        raise PowerCutError


def test_an_interrupted_run_goes_on_with_the_same_images_and_weights(trainings, tmp_path):
    """In single precision and with one micro-batch per batch, both runs round in the same way."""
    settings = {**ON_GPU, "bn_group": 8, "epochs": 3, "augment_on": "device"}
    whole = trainings.train(tmp_path, **settings)
    part = trainings.train(tmp_path, **settings, callbacks=[("on_train_batch_end", cut)], raises=PowerCutError)
    again = trainings.train(tmp_path, part.folder / "weights" / "last.pt", resume=True)
    assert f"resume: epoch 2, after batch 1 of {BATCHES}" in again.log
    left = (3 * BATCHES - BATCHES - 1) * 8  # images; a new run also has a few in its warm-up
    assert again.sums[-left:] == pytest.approx(whole.sums[-left:], rel=1e-9)
    assert len(again.results) == 3
    for name, value in whole.after.items():
        assert torch.allclose(value.float(), again.after[name].float(), rtol=1e-3, atol=1e-4), name


def test_images_from_the_device_are_those_of_the_host(trainings, tmp_path):
    """Hooks see the images here, so that they are rendered as bytes, as for any code that looks at them."""
    settings = {**ON_GPU, "bn_group": 8, "amp": True, "epochs": 1, "mixup": 0.3, "degrees": 10.0}
    host, device = (trainings.train(tmp_path, **settings, augment_on=where) for where in ("host", "device"))
    count = BATCHES * 8  # images; there may be a few more in a warm-up
    # One of 255 less in an eighth of the values, as in drawn images of few colours, is a thousandth of the sum.
    assert device.sums[-count:] == pytest.approx(host.sums[-count:], rel=5e-3)
    assert device.sums[-count:] != host.sums[-count:]
    column = "train/box_loss"
    assert device.results[-1][column] == pytest.approx(host.results[-1][column], rel=0.2)


SMALLEST_MIB = 300
"""Less than one image of 1,280 pixels needs with YOLOv8-N in single precision, even with all layers recomputed."""


def test_images_get_smaller_under_a_limit_that_is_refused_otherwise(run_python, tmp_path):
    """Without smaller images, the error names a limit, which is only a lower bound if an image failed."""
    words = {**ON_GPU, "imgsz": 1280, "batch": 2, "nbs": 2, "epochs": 1, "deterministic": False, "val": False}
    words |= {"model": "yolov8n.yaml", "project": tmp_path, "optimizer": "SGD", "plots": False}

    def train(name, limit_mib, **more):
        given = {**words, "name": name, "mem_limit": f"{limit_mib}MiB", **more}
        return run_python("-m", "yolov12.cli", "train", *(f"{key}={value}" for key, value in given.items()))

    refused, limit_mib = [], SMALLEST_MIB
    while (off := train("off", limit_mib, mas_data="off", exist_ok=True)).returncode:
        named = re.search(r"a mem_limit (?:of|above) ([\d,]+) MiB", off.stderr)
        assert named is not None, off.stderr[-3000:]
        assert len(refused) < 5
        refused.append(limit_mib)
        limit_mib = int(named[1].replace(",", ""))
    assert refused
    auto = train("auto", refused[-1])
    assert auto.returncode == 0, auto.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "auto" / "memory.csv").read_text().splitlines()))
    assert any("image size 1280 to 1248" in row["events"] for row in rows)
    assert any(int(row["image_size"].split("x")[0]) < 1280 for row in rows)
    assert json.loads((tmp_path / "auto" / "memory.json").read_text())["images_lost"] == 0


def test_every_limit_ends_with_the_work_it_is_for(trainings, tmp_path):
    """A prediction in a callback restores the training's limit. Afterwards the process may use the whole device."""
    total = torch.cuda.mem_get_info()[1]
    refused = []

    def fits(fraction):
        try:
            torch.empty(int(fraction * total), dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    def predict(trainer):
        YOLO("yolov8n.yaml").predict(str(images), device=0, imgsz=320, batch=8, mem_limit=0.1, verbose=False)
        refused.append((fits(0.3), not fits(0.45)))

    images = Path(trainings.draw_data(tmp_path / "data")).parent / "images"
    trainings.train(tmp_path, **ON_GPU, epochs=1, mem_limit=0.4, callbacks=[("on_train_epoch_end", predict)])
    assert refused == [(True, True)]
    YOLO("yolov8n.yaml").val(data=trainings.TINY["data"], device=0, imgsz=320, mem_limit=0.2, plots=False)
    YOLO("yolov8n.yaml").predict(str(images), device=0, imgsz=320, batch=8, mem_limit=0.1, verbose=False)
    assert fits(0.45)
