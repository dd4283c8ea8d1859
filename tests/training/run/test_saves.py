"""When and how a run is saved."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from ultralytics.utils.torch_utils import strip_optimizer

from yolov12.errors import ConfigError
from yolov12.files import AtomicPath
from yolov12.mas.distributed.ranks import ALONE
from yolov12.training.run import run_state
from yolov12.training.run.interruption import Interruption
from yolov12.training.run.options import Interval


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = AtomicPath(tmp_path) / "last.pt"
    assert path.write_bytes(b"old") == 3
    with pytest.raises(TypeError):
        path.write_bytes("not bytes")
    assert path.read_bytes() == b"old"
    path.write_bytes(b"newer")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("last.pt", b"newer")]


def test_a_checkpoint_that_is_stripped_is_whole_at_any_moment(interrupted, monkeypatch):
    last = interrupted() / "weights" / "last.pt"
    before, save = last.read_bytes(), torch.save

    def full_disk(what, file):
        save(what, file)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        strip_optimizer(last)
    assert last.read_bytes() == before
    monkeypatch.undo()
    assert strip_optimizer(last)["optimizer"] is None
    assert len(last.read_bytes()) < len(before)
    assert {path.name for path in last.parent.glob("*.*t")} == {"last.pt", "best.pt", "state.pt"}


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("5min", Interval(seconds=300.0)),
        ("0.5 h", Interval(seconds=1800.0)),
        ("30s", Interval(seconds=30.0)),
        (100, Interval(steps=100)),
        ("1", Interval(steps=1)),
        (0, Interval()),
        (False, Interval()),
    ],
)
def test_intervals_are_steps_or_times(text, interval):
    assert Interval.parse(text) == interval


@pytest.mark.parametrize("text", ["soon", "-1", "1.5", True, "0min", None, "5 parsecs"])
def test_other_intervals_are_refused(text):
    with pytest.raises(ConfigError, match="save_every"):
        Interval.parse(text)


def test_intervals_are_due_after_so_many_steps_or_seconds():
    assert [Interval(steps=2).due(steps, 1e9) for steps in (1, 2)] == [False, True]
    assert [Interval(seconds=2.0).due(10**9, seconds) for seconds in (1.9, 2.0)] == [False, True]
    assert not Interval().due(10**9, 1e9)


@pytest.mark.parametrize(
    ("every", "share", "saves"), [(1, 0, 8), (3, 0, 2), (3, 1e9, 4), ("1h", 0, 1), ("1h", 1e9, 2), (0, 1e9, 0)]
)
def test_a_run_is_saved_as_often_as_asked(trainings, tmp_path, monkeypatch, every, share, saves):
    """The run has 8 updates in 2 epochs. It is also saved at the end of an epoch if that takes little time.

    The watchdog knows of each save, and does not end a process that is about it.
    """
    saved, known = [], []
    save = run_state.RunSaver._save

    @contextmanager
    def saving(_):
        known.append(len(saved))
        yield
        assert len(saved) == known[-1] + 1

    monkeypatch.setattr(run_state.RunSaver, "_save", lambda saver: saved.append(saver) or save(saver))
    monkeypatch.setattr(type(ALONE), "saving", saving)
    monkeypatch.setattr(run_state, "_COST", share)
    run = trainings.train(tmp_path, bn_group=8, save_every=every)
    assert len(saved) == len(known) == saves
    assert not (run.folder / "weights" / "state.pt").exists()


def test_what_is_not_to_be_saved_is_not(trainings, power, cut, tmp_path):
    run = cut(tmp_path, save=False)
    assert not list((run.folder / "weights").glob("*.pt"))
    stock = trainings.train(tmp_path, mas=False, callbacks=power.cut_at(6), raises=power.CutError)
    assert {path.name for path in (stock.folder / "weights").iterdir()} == {"last.pt", "best.pt"}


def test_a_run_without_a_free_disk_goes_on(trainings, tmp_path, monkeypatch):
    write = run_state.files.write

    def full(path, write_to):
        if path.name == "state.pt":
            raise OSError("No space left on device")
        write(path, write_to)

    monkeypatch.setattr(run_state.files, "write", full)
    run = trainings.train(tmp_path, bn_group=8, save_every=1)
    assert len(run.results) == 2
    assert "state.pt could not be written, No space left on device" in run.log


def test_an_optimizer_step_that_was_cut_is_not_saved(trainings, tmp_path):
    def break_at(trainer):
        if trainer.epoch == 1:
            trainer.ema.update = lambda model: 1 / 0

    run = trainings.train(
        tmp_path, bn_group=8, save_every=0, callbacks=[("on_train_epoch_start", break_at)], raises=ZeroDivisionError
    )
    assert not (run.folder / "weights" / "state.pt").exists()
    assert (run.folder / "weights" / "last.pt").exists()


def test_what_has_no_numbers_is_not_saved(trainings, tmp_path, power):
    def spoil(trainer):
        if trainer.epoch == 1:
            next(trainer.model.parameters()).data.fill_(float("nan"))

    run = trainings.train(
        tmp_path,
        bn_group=8,
        save_every=1,
        callbacks=[("on_train_epoch_start", spoil), *power.cut_at(6)],
        raises=power.CutError,
    )
    assert torch.load(run.folder / "weights" / "state.pt", weights_only=True)["epoch"] == 0


def test_buffers_that_are_registered_again_in_another_order_are_saved_by_name(tmp_path):
    model = torch.nn.Module()
    for name, value in {"zeros": 0.0, "ones": 1.0}.items():
        model.register_buffer(name, torch.full((2,), value))
    trainer = SimpleNamespace(args=SimpleNamespace(save=True), wdir=tmp_path)
    saver = run_state.RunSaver(trainer, model, None, None, Interval(), None, {}, Interruption())
    saver._kept_buffers()
    del model.zeros
    model.register_buffer("zeros", torch.zeros(2))
    assert {name: float(value[0]) for name, value in saver._kept_buffers().items()} == {"zeros": 0.0, "ones": 1.0}
