"""Trainings of other tasks than detection: whether their batches are split, and what the log tells."""

import cv2
import numpy as np
import pytest
from ultralytics import RTDETR, YOLO

TWICE = "memory: this loss has several normalisers: a batch that is split runs its forward pass twice"
SMALL = {"epochs": 1, "batch": 4, "nbs": 4}


SCALED = {"multi_scale": 0.5, "imgsz": 96, "overlap_mask": False}


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
@pytest.mark.parametrize("more", [{}, SCALED], ids=["plain", "scaled"])
def test_a_task_whose_batches_are_split(trainings, tiny_models, tmp_path, task, more):
    model = tiny_models[task]
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


def test_classification_is_not_split(trainings, tmp_path):
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("dark", "bright"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(4):
                image = draw.integers(0, 100, (32, 32, 3), dtype=np.uint8) + (100 if name == "bright" else 0)
                cv2.imwrite(str(tmp_path / "data" / split / name / f"{index}.png"), image)
    run = trainings.train(tmp_path, "yolo11n-cls.yaml", **SMALL, data=str(tmp_path / "data"))
    assert_stock(run, "ClassificationModel is not split up")


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
