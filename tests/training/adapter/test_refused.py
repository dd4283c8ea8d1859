"""If not even one image fits, one error names the bytes needed, and no files are left."""

import re
from dataclasses import replace

import pytest
import torch
from ultralytics.utils.torch_utils import unwrap_model

from yolov12 import cli
from yolov12.errors import DoesNotFitError
from yolov12.mas import engine, room
from yolov12.mas.memory.host import HostMeter
from yolov12.training.adapter.memory_needs import optimizer_bytes

MESSAGE = re.compile(
    r"one image needs (?P<needed>[\d,]+) MiB at its peak, "
    r"the budget is (?P<budget>[\d,]+) MiB \((?P<free>[\d,]+) MiB free\)\. "
    r"Ways out: (?P<first>[^;]+); or (?P<second>[^;]+); or (?P<third>[^;]+)$"
)


@pytest.fixture(autouse=True)
def others(monkeypatch):
    """Pretend that other processes hold 8 GiB, whatever runs on this machine, and let the engine not wait."""
    read = HostMeter.read
    monkeypatch.setattr(HostMeter, "read", lambda meter: replace(read(meter), others_bytes=8 * 2**30))
    monkeypatch.setattr(engine, "WAIT_S", 0)
    monkeypatch.setattr(room, "WAIT_S", 0)
    monkeypatch.setattr(engine, "_PATIENCE_S", 0)


def test_one_image_that_does_not_fit_ends_in_an_error_with_numbers(trainings, tmp_path):
    with pytest.raises(DoesNotFitError) as caught:
        trainings.train(tmp_path / "runs", mem_limit="1MiB")
    found = MESSAGE.search(str(caught.value))
    assert found is not None, str(caught.value)
    number = {name: int(found[name].replace(",", "")) for name in ("needed", "budget", "free")}
    assert 200 < number["needed"] < 4000  # most of them are Python and PyTorch
    assert number["budget"] <= 1
    assert number["free"] > 100
    assert not any((tmp_path / "runs").rglob("*"))
    assert "other processes" not in str(caught.value)  # memory that they release would not raise a limit


def test_the_command_line_prints_the_error_in_one_line(trainings, tiny_model, tmp_path, capsys):
    arguments = {**trainings.TINY, "plots": True, "project": tmp_path / "runs"}
    tiny = [f"{key}={value}" for key, value in arguments.items()]
    assert cli.main(["train", f"model={tiny_model}", *tiny, "mem_limit=1MiB"]) == 1
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("yolov12: error: one image needs ")
    assert MESSAGE.search(last)
    assert "Traceback" not in error
    assert "YOLOV12_TRACEBACK" not in error
    assert not any((tmp_path / "runs").rglob("*"))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "MuSGD"])
def test_the_optimizer_state_is_counted_until_it_is_allocated(trainings, tmp_path, optimizer):
    """A limit that the error names must suffice after the first update, too."""
    counted = []

    def count(trainer):
        counted.append(optimizer_bytes(trainer.optimizer, unwrap_model(trainer.model)))

    callbacks = [("on_train_start", count), ("on_train_end", count)]
    run = trainings.train(tmp_path, "yolov8n.yaml", optimizer=optimizer, epochs=1, val=False, callbacks=callbacks)
    state = [value for values in run.trainer.optimizer.state.values() for value in values.values()]
    held = sum(value.numel() * value.element_size() for value in state if isinstance(value, torch.Tensor))
    assert counted == [pytest.approx(held, rel=0.02), 0]


def test_the_folder_of_a_run_that_has_trained_is_kept(trainings, tmp_path):
    """A run that has trained for a while is not removed."""

    def stop(trainer):
        raise DoesNotFitError("later")

    with pytest.raises(DoesNotFitError):
        trainings.train(tmp_path, **trainings.SPLIT, callbacks=[("on_train_batch_end", stop)])
    (run,) = tmp_path.iterdir()
    assert len((run / "memory.csv").read_text().splitlines()) == 2
