"""Validation and prediction in slices give the same numbers for any size of slices and after failed allocations."""

import functools
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML
from ultralytics.utils.checks import check_yaml

from yolov12.errors import ConfigError, DoesNotFitError


@pytest.fixture(scope="module")
def data(trainings, tmp_path_factory):
    """40 images with one object that nearly fills the image, so that a model finds it after little training."""
    folder = tmp_path_factory.mktemp("data") / "data"
    file = trainings.draw_data(folder, "detect", [(128, 128)] * 5)
    for index in range(40):
        size = f"{0.8 + index / 200} {1.0 - index / 200}"
        (folder / "labels" / f"{index}.txt").write_text(f"{index % 2} 0.5 0.5 {size}")
    return file


@pytest.fixture(scope="module")
def run(trainings, tmp_path_factory, data):
    """One training."""
    folder = tmp_path_factory.mktemp("run")
    return trainings.train(folder, data=data, optimizer="AdamW", lr0=2e-3, epochs=8, batch=8, val=False)


@pytest.fixture(scope="module")
def weights(run):
    """Weights that are as confident as those of a long training: boxes have 15 cells of 8 pixels each."""
    return changed(run, lambda head: head.cv3[0][-1].bias.data.add_(6))


def changed(run, change):
    """The file of a run's last weights with another head."""
    checkpoint = torch.load(run.folder / "weights" / "last.pt", weights_only=False)
    change(checkpoint["model"].model[-1])
    torch.save(checkpoint, run.folder / "weights" / "changed.pt")
    return run.folder / "weights" / "changed.pt"


@pytest.fixture(autouse=True)
def same_arithmetic():
    """Use PyTorch's own convolutions; in oneDNN and NNPACK, rounding depends on the number of images."""
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


@pytest.fixture
def sizes(monkeypatch):
    """Number of images in every forward pass of the model in evaluation mode."""
    from ultralytics.nn.tasks import BaseModel

    seen, forward = [], BaseModel.forward

    @functools.wraps(forward)  # it stays recognisable as Ultralytics' own
    def look(self, x, *args, **kwargs):
        if not self.training and isinstance(x, torch.Tensor):
            seen.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(BaseModel, "forward", look)
    return seen


def validate(weights, data, folder, **settings):
    model = YOLO(weights)
    options = {
        "data": data,
        "imgsz": 128,
        "channels_last": False,
        "batch": 32,
        "device": "cpu",
        "plots": False,
        "save_json": True,
        "conf": 0.001,
    }
    metrics = model.val(project=folder, **options, **settings)
    predictions = json.loads((metrics.save_dir / "predictions.json").read_text())
    return metrics, predictions


def test_slices_give_the_same_metrics_and_predictions(weights, data, tmp_path, sizes):
    stock, wanted = validate(weights, data, tmp_path, mas=False)
    assert len(wanted) > 100
    assert stock.box.map50 > 0
    stock_sizes = {size for size in sizes if size > 1}
    for size in (1, 7, 64, None):
        sizes.clear()
        metrics, predictions = validate(weights, data, tmp_path, micro_batch=size)
        assert predictions == wanted
        assert metrics.results_dict == stock.results_dict
        assert np.array_equal(metrics.confusion_matrix.matrix, stock.confusion_matrix.matrix)
        if size:
            assert max(sizes) == min(size, max(stock_sizes))
        assert all(value >= 0 for value in metrics.speed.values())


def test_failed_allocations_change_no_number(weights, data, tmp_path, monkeypatch):
    from ultralytics.nn.tasks import BaseModel

    _, wanted = validate(weights, data, tmp_path, mas=False)
    forward, failed, most = BaseModel.forward, [], [5]

    def fail(self, x, *args, **kwargs):
        if len(x) > most[0]:
            failed.append(len(x))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(BaseModel, "forward", fail)
    assert validate(weights, data, tmp_path)[1] == wanted
    assert max(failed) > 5
    most[0] = 0
    with pytest.raises(DoesNotFitError, match="Ways out"):
        validate(weights, data, tmp_path)
    assert failed[-1] == 1


def test_a_wrong_setting_is_refused_before_any_data_is_read(weights, tmp_path):
    with pytest.raises(ConfigError, match="mem_safety_ratio"):
        validate(weights, tmp_path / "nothing.yaml", tmp_path, mem_safety_ratio=2)


def test_validation_in_a_training_gives_the_losses_of_whole_batches(run, sizes):
    trainer = run.trainer
    validator = trainer.get_validator()
    validator.args.plots = False
    found = {}
    for name, settings in {"whole": {"mas": False}, "ones": {"micro_batch": 1}, "sevens": {"micro_batch": 7}}.items():
        vars(validator).pop("_yolov12_slices", None)
        vars(validator.args).update({"mas": True, "micro_batch": None, **settings})
        sizes.clear()
        found[name] = validator(trainer)
        assert max(sizes) == {"whole": 16, "ones": 1, "sevens": 7}[name]
    assert found["whole"]["val/box_loss"] > 0
    for name in ("ones", "sevens"):
        assert found[name] == pytest.approx(found["whole"], abs=1.1e-5)  # values are rounded to five places
    model = trainer.ema.ema
    assert not {"forward", "loss"} & vars(model).keys()
    assert not {"preprocess", "postprocess", "init_metrics", "finalize_metrics"} & vars(validator).keys()


def test_a_training_validates_in_slices(trainings, data, tmp_path, sizes):
    run = trainings.train(tmp_path, data=data, batch=16, epochs=1, **trainings.SPLIT)
    assert max(size for size in sizes if size) == 2
    assert run.results[-1]["val/box_loss"] > 0


@pytest.mark.parametrize("size", [None, 3])
def test_prediction_of_a_list(weights, sizes, size):
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 255, (128, 128, 3), dtype=np.uint8) for _ in range(10)]
    model = YOLO(weights)
    options = {"imgsz": 128, "conf": 0.001, "device": "cpu", "channels_last": False, "verbose": False}
    wanted = model.predict(images, batch=10, mas=False, **options)
    sizes.clear()
    found = YOLO(weights).predict(images, batch=10, micro_batch=size, **options)
    assert len(found) == len(wanted) == 10
    for ours, stock in zip(found, wanted, strict=True):
        assert torch.equal(ours.boxes.data, stock.boxes.data)
    assert max(sizes) == (size or 5)


class Keeping(torch.nn.SiLU):
    """An activation that keeps what it returns, for all of its copies."""

    kept: ClassVar = []

    def forward(self, x):
        Keeping.kept.append(super().forward(x))
        return Keeping.kept[-1]


def _hook(model, kept):
    model.model.model[2].register_forward_hook(lambda module, inputs, output: kept.append(output))


def _pre_hook(model, kept):
    model.model.model[3].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))


def _layer(model, kept):
    model.model.model[1].act, Keeping.kept = Keeping(), kept


@pytest.mark.parametrize("keep", [_hook, _pre_hook, _layer])
def test_what_a_user_keeps_in_a_prediction_is_of_the_whole_batch(weights, sizes, monkeypatch, keep):
    images = [np.full((128, 128, 3), 20 * index, dtype=np.uint8) for index in range(5)]
    options = {"imgsz": 128, "device": "cpu", "channels_last": False, "verbose": False, "batch": 5}

    def kept(**settings):
        model, found = YOLO(weights), []
        model.fuse()
        keep(model, found)
        model.predict(images, **options, **settings)
        return found

    stock, ours = kept(mas=False), kept()
    assert [len(each) for each in ours] == [5]
    assert torch.equal(ours[0], stock[0])
    assert [len(each) for each in kept(micro_batch=2)] == [2, 2, 1]
    assert len(kept(mem_limit=0.9)) > 1
    sizes.clear()
    YOLO(weights).predict(images, **options)
    assert sizes[-2:] == [1, 4]  # the negative control: without code of the user's own


def test_trackers_know_objects_by_the_features_of_all_images(weights, sizes, monkeypatch):
    """Ultralytics' tracker takes them from a hook on the head, which sees a slice at a time."""
    monkeypatch.setitem(sys.modules, "lap", SimpleNamespace(__version__="0"))  # it assigns boxes to tracks
    from ultralytics.trackers.track import on_predict_start

    def predict(**options):
        model, features = YOLO(weights), []
        model.add_callback("on_predict_start", functools.partial(on_predict_start, persist=False))
        model.add_callback("on_predict_postprocess_end", lambda predictor: features.extend(predictor.results))
        given = {"mode": "track", "tracker": "reid.yaml", "imgsz": 128, "conf": 0.001, "device": "cpu", "batch": 7}
        model.predict(images, **given, channels_last=False, verbose=False, **options)
        return [result.feats for result in features]

    settings = YAML.load(check_yaml("botsort.yaml")) | {"with_reid": True, "model": "auto"}
    monkeypatch.setattr("ultralytics.trackers.track.YAML.load", lambda file: settings)
    monkeypatch.setattr("ultralytics.trackers.track.check_yaml", lambda file: file)
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 255, (128, 128, 3), dtype=np.uint8) for _ in range(7)]
    wanted = predict(mas=False)
    sizes.clear()
    found = predict(micro_batch=3)
    assert max(sizes) == 3
    assert len(found) == len(wanted) == 7
    assert all(len(each) for each in wanted)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_other_tasks(trainings, task_models, tmp_path, task, sizes):
    data = trainings.draw_data(tmp_path / "data", task, [(64, 64), (64, 96)])
    run = trainings.train(tmp_path, task_models[task], data=data, epochs=1, batch=8, val=False)
    # Scores that are nearly the same would be put in order by their last bit.
    file = changed(run, lambda head: [scores[-1].weight.data.mul_(100) for scores in head.cv3])
    results = []
    for settings in ({"mas": False}, {"micro_batch": 3}):
        sizes.clear()
        metrics = YOLO(file).val(data=data, imgsz=64, batch=8, device="cpu", plots=False, project=tmp_path, **settings)
        results.append((metrics.results_dict, max(size for size in sizes)))
    assert results[0][0] == results[1][0]
    assert [largest for _, largest in results] == [8, 3]
