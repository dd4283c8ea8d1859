"""The limit of the allocator: a training, a validation and a prediction each hold their own, and restore what was."""

from contextlib import contextmanager

import pytest
from torch import nn
from ultralytics import YOLO

from yolov12.mas import Config, Engine, TensorTask
from yolov12.mas.memory.host import HostMeter

LIMIT = {"train": "20GiB", "predict": "10GiB", "val": "15GiB"}
GIB = 2**30


@pytest.fixture
def held(monkeypatch):
    """Limits in GiB as they are set and restored."""
    held, stack = [], [None]

    @contextmanager
    def limited(meter):
        if meter._limit is None:
            yield
            return
        stack.append(meter._limit // GIB)
        held.append(stack[-1])
        yield
        stack.pop()
        held.append(stack[-1])

    monkeypatch.setattr(HostMeter, "limited", limited)
    return held


def test_a_prediction_in_a_callback_leaves_the_limit_of_the_training(trainings, tmp_path, held, data):
    other = YOLO("yolov8n.yaml")

    def predict(trainer):
        before = len(held)
        other.predict(data, imgsz=64, device="cpu", mem_limit=LIMIT["predict"], verbose=False, batch=2)
        assert held[before:] == [10, 20] * (len(held[before:]) // 2)
        assert len(held) > before

    trainings.train(tmp_path, epochs=1, mem_limit=LIMIT["train"], callbacks=[("on_train_epoch_end", predict)])
    assert (held[0], held[-1]) == (20, None)


@pytest.fixture(scope="module")
def data(trainings, tmp_path_factory):
    from pathlib import Path

    return str(Path(trainings.draw_data(tmp_path_factory.mktemp("data") / "drawn")).parent / "images")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_training_that_ends_with_an_error_restores_the_limit(trainings, tmp_path, held, error):
    def stop(trainer):
        raise error

    trainings.train(tmp_path, mem_limit=LIMIT["train"], callbacks=[("on_train_batch_end", stop)], raises=error)
    assert held == [20, None]


def test_a_validation_and_a_prediction_leave_no_limit(trainings, held, data):
    model = YOLO("yolov8n.yaml")
    model.val(data=trainings.TINY["data"], imgsz=64, device="cpu", mem_limit=LIMIT["val"], plots=False)
    assert held == [15, None]
    held.clear()
    model.predict(data, imgsz=64, device="cpu", mem_limit=LIMIT["predict"], verbose=False, batch=4)
    assert held == [10, None] * (len(held) // 2)
    assert held


def test_a_training_holds_its_limit_before_the_first_batch(trainings, tmp_path, held):
    """Also a training that runs as stock, with a loss of the user's own."""
    seen = []
    trainings.train(
        tmp_path, epochs=1, mem_limit=LIMIT["train"], callbacks=[("on_train_start", lambda trainer: seen.extend(held))]
    )
    assert seen == [20]


def test_making_an_engine_sets_nothing(held):
    model = nn.Conv2d(3, 3, 1)
    engine = Engine(model, TensorTask(lambda model, x: model(x).mean()), Config(limit=20 * GIB))
    assert held == []
    with engine:
        assert held == [20]
    assert held == [20, None]


def test_a_training_and_its_validation_that_go_over_their_limit_say_so(trainings, tmp_path, monkeypatch):
    """On a CPU, only the budget enforces a limit, and a prediction may be wrong."""
    peak = HostMeter.peak_bytes
    is_over = []
    monkeypatch.setattr(HostMeter, "peak_bytes", lambda meter: 21 * GIB if is_over else peak(meter))
    batches = []

    def go_over(trainer):
        batches.append(trainer.epoch)
        is_over.extend([True] * (len(batches) == trainings.BATCHES))

    run = trainings.train(
        tmp_path, epochs=1, mem_limit="20GiB", **trainings.SPLIT, callbacks=[("on_train_batch_start", go_over)]
    )
    limit = f"{min(20 * GIB, HostMeter().read().total_bytes) / 2**20:,.0f} MiB"
    assert [row["events"] for row in run.memory[:-1]] == [""] * (trainings.BATCHES - 1)
    assert run.memory[-1]["events"].startswith(f"over the limit of {limit}")
    assert run.summary["over_limit"] == 1
    assert "MiB, over the limit in 1 step; predicted" in run.log
    assert run.log.rstrip().endswith(f"\n  validation peaked at 21,504 MiB, over the limit of {limit}")


@pytest.mark.parametrize("batch", [1, 4])
def test_a_validation_and_a_prediction_that_go_over_their_limit_say_so(
    trainings, small_model, tmp_path, monkeypatch, caplog, batch
):
    data = trainings.draw_data(tmp_path / "data")
    model = YOLO(small_model)
    options = {"imgsz": 64, "device": "cpu", "batch": batch, "verbose": False}
    images = str(tmp_path / "data" / "images")
    for settings in ({"mem_limit": "20GiB"}, {}):
        model.predict(images, **options, **settings)
        model.val(data=data, plots=False, project=tmp_path, **options, **settings)
    assert "over the limit" not in caplog.text
    monkeypatch.setattr(HostMeter, "peak_bytes", lambda meter: 21 * GIB)
    model = YOLO(small_model)
    model.predict(images, **options, mem_limit="20GiB")
    assert caplog.text.count("memory: prediction peaked at 21,504 MiB, over the limit of ") == 1
    model.val(data=data, plots=False, project=tmp_path, **options, mem_limit="20GiB")
    assert caplog.text.count("memory: validation peaked at 21,504 MiB, over the limit of ") == 1
