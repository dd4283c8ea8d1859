"""Trainings of other tasks than detection: whether their batches are split, and what the log tells."""

import cv2
import numpy as np
import pytest
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import TASKS
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

from yolov12.errors import DataError

TWICE = "memory: this loss has several normalisers: a batch that is split runs its forward pass twice"
SMALL = {"epochs": 1, "batch": 4, "nbs": 4}


SCALED = {"multi_scale": 0.5, "imgsz": 96, "overlap_mask": False}


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
@pytest.mark.parametrize("more", [{}, SCALED], ids=["plain", "scaled"])
def test_a_task_whose_batches_are_split(trainings, task_models, tmp_path, task, more):
    model = task_models[task]
    data = trainings.draw_data(tmp_path / "data", task)
    run = trainings.train(tmp_path, model, **trainings.SPLIT, **SMALL, data=data, **more)
    assert run.micro_batches() == [[2, 2]] * 2
    has_terms = task != "obb"
    if has_terms:  # the first part shows that the loss has several normalisers, and the batch begins again
        del run.seen[0], run.sums[:2]
    assert [size[0] for size in run.seen] == [2] * 4
    assert run.ahead == [2] * 4 * has_terms
    assert run.log.count(TWICE) == has_terms
    assert (run.folder / "weights" / "best.pt").is_file()
    assert all(value == value for value in run.results[0].values())
    stock = trainings.train(tmp_path, model, mas=False, **SMALL, data=data, **more)
    assert run.batches(4) == stock.batches(4)
    assert run.draws == stock.draws


def test_keypoints_that_a_model_does_not_find_are_refused(trainings, tiny_models, tmp_path):
    data = trainings.draw_data(tmp_path / "data", "pose")
    with pytest.raises(DataError, match=r"kpt_shape=\[2, 3\], and the model finds those of \[17, 3\]"):
        YOLO(tiny_models["pose"]).val(data=data, imgsz=64, device="cpu", workers=0, plots=False)


def test_two_heads_have_several_normalisers(trainings, tmp_path):
    run = trainings.train(tmp_path, "yolov10n.yaml", **trainings.SPLIT, epochs=1)
    assert run.log.count(TWICE) == 1
    assert run.micro_batches() == [[2] * 4] * trainings.BATCHES
    assert run.ahead == [2] * 4 * trainings.BATCHES


def assert_stock(run, reason):
    assert run.log.count("memory:") == 1
    assert f"memory: {reason}: batches run as Ultralytics runs them" in run.log
    assert not list(run.folder.glob("memory*"))
    assert not any(name.startswith("memory/") for name in run.results[0])


@pytest.fixture
def data(trainings, tmp_path):
    """Data set of a task."""

    def get(task):
        draw, folder = np.random.default_rng(0), tmp_path / "data"
        if task != "classify":
            labels = {"semantic": "segment", "depth": "detect"}.get(task, task)
            file = trainings.draw_data(folder, labels)
            (folder / "depth").mkdir()
            for index in range(8):
                depth = draw.integers(1000, 3000, (64, 64), dtype=np.uint16)
                cv2.imwrite(str(folder / "depth" / f"{index}.png"), depth)
            return file
        for split in ("train", "val"):
            for name in ("dark", "bright"):
                (folder / split / name).mkdir(parents=True)
                for index in range(4):
                    image = draw.integers(0, 100, (32, 32, 3), dtype=np.uint8) + (100 if name == "bright" else 0)
                    cv2.imwrite(str(folder / split / name / f"{index}.png"), image)
        return str(folder)

    return get


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_validates_and_predicts(trainings, data, task_models, tmp_path, task):
    """With nothing split, the results are stock's."""
    model, file = task_models[task], data(task)
    is_split = task in ("detect", "segment", "pose", "obb")
    stock, ours = (
        trainings.train(tmp_path, model, **settings, **SMALL, data=file)
        for settings in ({"mas": False, "draws_by_place": is_split}, {"bn_group": 4, "micro_batch": 8})
    )
    assert ours.stock_results() == [pytest.approx(row, rel=1e-4, abs=2e-5) for row in stock.stock_results()]
    if not is_split:
        reason = f"{type(ours.trainer.model).__name__} is not split up"
        assert ours.log.count("as Ultralytics runs") == ours.log.count(f"memory: {reason}: batches run as") == 1
        assert not list(ours.folder.glob("memory*"))
    best = ours.folder / "weights" / "best.pt"
    options = {"imgsz": 64, "device": "cpu", "verbose": False}
    found = [
        YOLO(best).val(data=file, batch=4, plots=True, project=tmp_path, workers=0, **options, **settings).results_dict
        for settings in ({"mas": False}, {})
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-4, nan_ok=True)
    images = [np.full((64, 64, 3), 40 * index, np.uint8) for index in range(5)]
    predictions = [YOLO(best).predict(images, batch=5, **options, **settings) for settings in ({"mas": False}, {})]
    assert [each.verbose() for each in predictions[1]] == [each.verbose() for each in predictions[0]]
    assert len(predictions[1]) == 5


class Flat(DetectionModel):
    """A model of the user's own, which counts its calls."""

    calls = 0

    def predict(self, x, *args, **kwargs):
        type(self).calls += 1
        return super().predict(x, *args, **kwargs)


class OwnModel(DetectionTrainer):
    """Trains that model."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        return Flat(cfg, nc=self.data["nc"], verbose=False)


def test_a_model_of_a_users_own_class_is_not_split(trainings, data, task_models, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")
    run = trainings.train(tmp_path, task_models["detect"], trainer=OwnModel, data=data("detect"), save=False, **SMALL)
    assert_stock(run, "Flat is not split up")
    assert Flat.calls


def test_distillation_is_not_split(trainings, tiny_model, tmp_path):
    YOLO(tiny_model).save(tmp_path / "teacher.pt")
    run = trainings.train(tmp_path, epochs=1, distill_model=str(tmp_path / "teacher.pt"))
    assert_stock(run, "distill_model is set")


def test_a_compiled_model_is_not_split(trainings, tmp_path, monkeypatch):
    """Compilation is replaced, as it needs a compiler and is not tested here."""
    import ultralytics.engine.trainer as module

    monkeypatch.setattr(module, "attempt_compile", lambda model, **_: model)
    run = trainings.train(tmp_path, epochs=1, compile=True)
    assert_stock(run, "compile is set")


def test_other_models_are_not_split(trainings, tmp_path):
    run = trainings.train(tmp_path, RTDETR("yolov8-rtdetr.yaml"), epochs=1, fraction=0.125)
    assert_stock(run, "RTDETRDetectionModel is not split up")
