"""Without the engine, a training is Ultralytics' own; with it, weights are the same however batches were split."""

import csv
import json
from pathlib import Path

import pytest
import torch
from ultralytics.utils import SETTINGS

from yolov12 import demo

_TRAIN = "import json, sys; from ultralytics import YOLO; YOLO(sys.argv[1]).train(**json.loads(sys.argv[2]))"


@pytest.mark.parametrize("model", ["yolov8n.yaml", "yolo12n.yaml"])
def test_without_the_engine_a_training_is_stock_bit_for_bit(trainings, run_python, tmp_path, model):
    data = demo.ensure(trainings.TINY["data"], Path(SETTINGS["datasets_dir"]))
    left = []
    for patched, more in (("0", {}), ("1", {"mas": False, "recipe": False})):
        arguments = {**trainings.TINY, "data": str(data), "project": str(tmp_path), "name": f"run{patched}", **more}
        arguments = {key: value for key, value in arguments.items() if key != "recipe" or patched == "1"}
        done = run_python("-c", _TRAIN, model, json.dumps(arguments), YOLOV12_AUTOPATCH=patched)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / f"run{patched}"
        header, *rows = csv.reader((folder / "results.csv").read_text().splitlines())
        numbers = [[value for name, value in zip(header, row, strict=True) if name != "time"] for row in rows]
        checkpoint = torch.load(folder / "weights" / "last.pt", map_location="cpu", weights_only=False)
        left.append((header, numbers, checkpoint["model"].state_dict(), {file.name for file in folder.iterdir()}))
    (header, numbers, weights, files), (our_header, our_numbers, our_weights, our_files) = left
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
