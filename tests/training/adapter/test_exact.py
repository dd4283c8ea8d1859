"""Without the engine, a training is Ultralytics' own; with it, weights are the same however batches were split."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.utils import SETTINGS

from yolov12 import demo
from yolov12.training.adapter.detection import is_exact

_TRAIN = """
import json, sys
from ultralytics import YOLO
for model, arguments in json.load(sys.stdin):
    YOLO(model).train(**arguments)
"""


def left_in(folder):
    """The table without the clock, the weights, and which files there are."""
    header, *rows = csv.reader((folder / "results.csv").read_text().splitlines())
    numbers = [[value for name, value in zip(header, row, strict=True) if name != "time"] for row in rows]
    checkpoint = torch.load(folder / "weights" / "last.pt", map_location="cpu", weights_only=False)
    return header, numbers, checkpoint["model"].state_dict(), {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def models(tiny_model):
    """By name: one whose attention is ours, and one that we do not touch."""
    return {"yolo12n": "yolo12n.yaml", "tiny": tiny_model}


@pytest.fixture(scope="module")
def without_us(trainings, models, tmp_path_factory):
    """The folder of trainings of all models in a process that knows nothing of us."""
    project = tmp_path_factory.mktemp("stock")
    data = demo.ensure(trainings.TINY["data"], Path(SETTINGS["datasets_dir"]))
    arguments = {**trainings.TINY, "data": str(data), "project": str(project)}
    del arguments["recipe"]
    jobs = [(model, {**arguments, "name": name}) for name, model in models.items()]
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN],
        input=json.dumps(jobs),
        env={**os.environ, "YOLOV12_AUTOPATCH": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return project


@pytest.mark.parametrize("name", ["yolo12n", "tiny"])
def test_without_the_engine_a_training_is_stock_bit_for_bit(trainings, models, without_us, tmp_path, name):
    run = trainings.train(tmp_path, models[name], mas=False, draws_by_place=False, name=name)
    header, numbers, weights, files = left_in(without_us / name)
    our_header, our_numbers, our_weights, our_files = left_in(run.folder)
    assert our_header == header
    assert our_numbers == numbers
    assert our_files == files
    assert our_weights.keys() == weights.keys()
    assert all(torch.equal(our_weights[name], weights[name]) for name in weights)


OPTIONS = [
    {"optimizer": "SGD", "cls_pw": 0.5, "cache": "ram", "close_mosaic": 1},
    {"optimizer": "AdamW", "lr0": 0.001, "model": "yolov12n.yaml"},
    {"optimizer": "MuSGD", "freeze": 2, "batch": 5, "nbs": 5, "amp": False, "epochs": 1},
    {"multi_scale": 0.5, "imgsz": 96, "nbs": 16, "warmup_epochs": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
def test_one_micro_batch_gives_the_weights_of_ultralytics_own_step(trainings, tmp_path, options):
    """Without a split nothing may change, except BatchNorm's statistics by one ulp per batch.

    PyTorch's kernel rounds their moving average at another place.
    """
    stock = trainings.train(tmp_path, mas=False, **options)
    ours = trainings.train(tmp_path, bn_group=8, **options)
    parameters = {name for name, _ in ours.trainer.model.named_parameters()}
    before, after = stock.after, ours.after
    assert all(torch.equal(after[name], before[name]) for name in parameters)
    torch.testing.assert_close(after, before, rtol=2**-23 * len(ours.draws), atol=2**-23 * len(ours.draws))
    assert ours.draws == stock.draws
    assert ours.calls == stock.calls
    assert (ours.steps, ours.trainer.ema.updates) == (stock.steps, stock.trainer.ema.updates)
    for row, stock_row in zip(ours.stock_results(), stock.stock_results(), strict=True):
        assert row == pytest.approx(stock_row, abs=2e-5)  # values are rounded to 1e-5


TRAINERS = {"segment": SegmentationTrainer, "pose": PoseTrainer}


@pytest.mark.parametrize("task", TRAINERS)
def test_a_split_gives_the_losses_and_weights_of_the_whole_batch(trainings, task_models, tmp_path, task):
    """For losses with several normalisers, if `exact` is not False. The user's `preprocess_batch` is called once."""
    calls = []

    class Trainer(TRAINERS[task]):
        def preprocess_batch(self, batch):
            calls.append(len(batch["img"]))
            return super().preprocess_batch(batch)

    data = trainings.draw_data(tmp_path / "data", task, [(64, 64)] * 2)
    found = {}
    for name, options in {
        "whole": {"micro_batch": 8},
        "split": {"micro_batch": 2},
        "averaged": {"micro_batch": 2, "exact": False},
    }.items():
        del calls[:]
        options |= {"trainer": Trainer, "data": data, "bn_group": 2, "name": name}
        run = trainings.train(tmp_path, task_models[task], **options, warmup_bias_lr=0.01)
        losses = [value for row in run.results for key, value in row.items() if key.startswith("train/")]
        found[name] = torch.cat([value.flatten() for value in run.after.values() if value.is_floating_point()]), losses
        assert len(run.ahead) == (16 if name == "split" else 0)  # 2 epochs of 2 batches of 4 parts
        assert calls == [8] * 4 if name != "averaged" else [2] * 16
    weights, losses = found["whole"]
    assert found["split"][1] == pytest.approx(losses, rel=1e-3)
    assert found["averaged"][1] != pytest.approx(losses, rel=1e-2)
    assert float((found["split"][0] - weights).norm() / weights.norm()) < 1e-4
    assert float((found["averaged"][0] - weights).norm() / weights.norm()) > 1e-3
    assert_validation_in_slices_is_whole(run.trainer)


def assert_validation_in_slices_is_whole(trainer):
    validator, found = trainer.get_validator(), []
    validator.args.plots = False
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's rounding depends on the number of images
        for settings in ({"mas": False}, {"mas": True, "micro_batch": 3}):
            vars(validator.args).update({"micro_batch": None, **settings})
            found.append({name: value for name, value in validator(trainer).items() if "loss" in name})
    assert len(found[0]) == 5
    assert found[1] == pytest.approx(found[0], abs=1.1e-5)  # values are rounded to five places


def test_detection_does_not_depend_on_exact(trainings, tiny_model, tmp_path):
    runs = [
        trainings.train(tmp_path, tiny_model, epochs=1, **trainings.SPLIT, exact=exact, name=str(exact))
        for exact in (True, False)
    ]
    assert all(torch.equal(value, runs[1].after[name]) for name, value in runs[0].after.items())
    assert all(run.ahead == [] and len(run.seen) == 4 * trainings.BATCHES for run in runs)


@pytest.mark.parametrize(
    ("task", "exact", "is_known"),
    [("detect", False, True), ("obb", False, True), ("segment", True, True), ("segment", False, False)],
)
def test_the_summary_says_the_same_gradient_only_where_a_split_has_it(task_models, task, exact, is_known):
    model = YOLO(task_models[task]).model
    model.args = get_cfg(overrides=model.args)  # as a trainer sets it
    assert is_exact(model, exact) is is_known
    model.model[0].bn = nn.SyncBatchNorm(8)  # normalises each part
    assert not is_exact(model, exact)
