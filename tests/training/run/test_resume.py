"""Saving and resuming runs: when a run is saved, which run `resume=auto` continues, and files that cannot be used."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import YAML
from ultralytics.utils.torch_utils import strip_optimizer

from yolov12.errors import ConfigError, DataError
from yolov12.files import AtomicPath, lock
from yolov12.mas import Engine, compile_ahead
from yolov12.mas.distributed.ranks import ALONE
from yolov12.models import weights
from yolov12.training.run import run_state, session
from yolov12.training.run.interruption import Interruption
from yolov12.training.run.options import Interval
from yolov12.training.run.resume import begun, latest_interrupted


@pytest.fixture
def cut(trainings, power):
    """Train until a power cut, by default in the second epoch."""
    return lambda folder, batch=6, **arguments: trainings.train(
        folder, bn_group=8, callbacks=power.cut_at(batch), raises=power.CutError, **arguments
    )


def test_kernels_are_compiled_ahead_until_the_first_batch_after_those_that_are_skipped(
    interrupted, trainings, tmp_path, monkeypatch
):
    told, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda *args, **options: (told.append("step"), step(*args, **options))[1])
    monkeypatch.setattr(compile_ahead, "end", lambda: told.append("end"))
    trainings.train(tmp_path, interrupted() / "weights" / "last.pt", resume=True)
    assert told[:2] == ["step", "end"]


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


def test_auto_goes_on_with_the_run_that_was_interrupted_last(trainings, interrupted, tmp_path, cut):
    name = {"project": tmp_path, "name": "line"}
    assert latest_interrupted(name, "detect") is None
    first = interrupted()
    second = cut(tmp_path, name="line").folder
    interrupted(name="line2")
    complete = trainings.train(tmp_path, bn_group=8, name="line", epochs=1).folder
    assert {folder.name for folder in (first, second, complete)} == {"line", "line-2", "line-3"}
    assert latest_interrupted(name, "detect") == second / "weights" / "last.pt"
    assert latest_interrupted({**name, "name": "other"}, "detect") is None

    for folder in (second, first):
        again = trainings.train(bn_group=8, resume="auto", **name, **trainings.TINY)
        assert again.folder == folder
        assert len(again.results) == 2
        assert "Resume ignores" not in again.log
    anew = trainings.train(bn_group=8, resume="auto", **name, **trainings.TINY)
    assert anew.folder.name == "line-4"
    assert "starting anew" in anew.log


def test_auto_begins_anew_in_the_folder_of_a_run_that_was_killed_before_its_first_checkpoint(trainings, tmp_path):
    """So the weights are where the same command, which a supervisor repeats, has always put them."""
    name = {"project": tmp_path, "name": "line"}
    third = tmp_path / "line-3"

    def leave(folder, *files):
        (folder / "weights").mkdir(parents=True)
        for file in files:
            (folder / file).write_text("")

    def as_killed(trainer):
        """Copy the folder, and what a kill may leave besides. The copy of the lock is held by nobody."""
        copy = tmp_path / "killed" / str(len(killed))
        killed.append(copy)
        shutil.copytree(trainer.save_dir, copy)
        if len(killed) == 2:
            for file in ("train_batch0.jpg", "memory.rank1.csv", "weights/state.pt", "weights/last.pt.unfinished"):
                (copy / file).touch()
            raise KeyboardInterrupt

    leave(tmp_path / "line", "args.yaml", "memory.csv", "weights/best.pt")  # somebody's weights
    leave(tmp_path / "line-2", "args.yaml", "train_batch0.jpg")  # a run of stock Ultralytics, which has no lock
    leave(tmp_path / "line2", "args.yaml", "memory.csv")
    killed = []
    moments = [(event, as_killed) for event in ("on_pretrain_routine_start", "on_train_batch_end")]
    trainings.train(tmp_path / "other", bn_group=8, plots=True, callbacks=moments, raises=KeyboardInterrupt)
    for copy in killed:
        assert begun(name, "detect") is None
        copy.rename(third)
        held = lock(third / "weights")
        assert begun(name, "detect") is None
        held.release()
        (third / "weights" / ".lock").touch()  # a kill does not delete it
        assert begun(name, "detect") == third
        if copy is not killed[-1]:
            third.rename(copy)
    model = SimpleNamespace(task="detect", overrides={}, ckpt=None, ckpt_path=None)
    for choice in ({"mas": False}, {"exist_ok": True}, {"save_dir": str(tmp_path / "own")}):  # without MAS: no lock
        given = {**name, **choice, "resume": "auto"}
        assert session._resolve_resume(model, given) == {**given, "resume": False}
    words = {**trainings.TINY, **name, "epochs": 1, "bn_group": 8, "resume": "auto"}
    anew = trainings.train(**words)
    assert anew.folder == third
    assert f"starting anew in {third}" in anew.log
    assert len(anew.results) == 1
    assert trainings.train(**words).folder.name == "line-4"


def test_auto_finds_a_run_whose_folder_was_moved(trainings, interrupted, tmp_path):
    """Mounted folders may move."""
    here = interrupted(tmp_path / "a")
    there = tmp_path / "b" / "line"
    (tmp_path / "b").mkdir()
    here.rename(there)
    again = trainings.train(resume="auto", project=tmp_path / "b", name="line", **trainings.TINY)
    assert again.folder == there
    assert not here.exists()


def test_a_run_that_was_killed_after_its_last_epoch_is_complete_with_a_resume(trainings, tmp_path, power):
    """Its checkpoint tells already that the run is complete."""

    def cut_in_the_end(trainer):
        strip_optimizer(trainer.last)
        raise power.CutError

    run = trainings.train(
        tmp_path,
        bn_group=8,
        save_every=1,
        callbacks=[("on_model_save", lambda t: t.epoch and cut_in_the_end(t))],
        raises=power.CutError,
    )
    whole = trainings.train(tmp_path, bn_group=8)
    again = trainings.train(tmp_path, run.folder / "weights" / "last.pt", resume=True)
    assert again.folder == run.folder
    assert again.stock_results() == whole.stock_results()
    assert again.steps == 0


def test_a_state_of_other_batches_is_not_gone_on_from(trainings, interrupted, tmp_path):
    folder = interrupted()
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True, batch=16)
    assert "2 batches, not 4, 16 images at once, not 8. Going on from the end of an epoch" in again.log
    assert len(again.results) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("ema"), "it is of another version, or not a state of this package"),
        (lambda state: state.pop("resolution"), "it is of another version, or not a state of this package"),
        (lambda state: state["model"].update({"model.0.conv.weight": torch.zeros(2)}), "it is of another model"),
    ],
)
def test_a_state_that_is_not_of_this_training_is_not_gone_on_from(trainings, interrupted, tmp_path, change, reason):
    folder = interrupted()
    file = folder / "weights" / "state.pt"
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert f"{file} is not used: {reason}. Going on from the end of an epoch" in again.log
    assert len(again.results) == 2


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (lambda names: [*names, "another"], "it has {} classes, and the run that shall be resumed has {}"),
        (lambda names: names[::-1], "its classes are in another order than those of the run that shall be resumed"),
    ],
)
def test_a_resume_with_other_classes_says_what_to_do(trainings, interrupted, tmp_path, names, reason):
    last = interrupted() / "weights" / "last.pt"
    before = last.read_bytes()
    data = check_det_dataset(weights.read(last)["train_args"]["data"])
    known = list(data["names"].values())
    settings = {"path": str(data["path"]), "train": data["train"], "val": data["val"], "names": names(known)}
    YAML.save(tmp_path / "other.yaml", settings)
    with pytest.raises(DataError, match=reason.format(len(known) + 1, len(known))):
        trainings.train(tmp_path, last, resume=True, data=str(tmp_path / "other.yaml"))
    assert last.read_bytes() == before
    assert trainings.train(tmp_path, last, resume=True).results


def test_a_state_that_would_run_code_is_not_read(trainings, interrupted, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = interrupted()
    torch.save({"epoch": Evil()}, folder / "weights" / "state.pt")
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert "it cannot be read (UntrustedWeightsError). Going on from the end of an epoch" in again.log
    assert not (tmp_path / "pwned").exists()
    assert len(again.results) == 2


def test_a_state_that_is_older_than_the_checkpoint_is_not_gone_on_from(trainings, tmp_path, cut, power):
    run = cut(tmp_path, batch=2, epochs=3)
    old = (run.folder / "weights" / "state.pt").read_bytes()
    last = run.folder / "weights" / "last.pt"
    cut_again = trainings.train(tmp_path, last, resume=True, callbacks=power.cut_at(10), raises=power.CutError)
    assert cut_again.folder == run.folder
    (run.folder / "weights" / "state.pt").write_bytes(old)
    again = trainings.train(tmp_path, last, resume=True)
    assert "resume: epoch" not in again.log
    assert len(again.results) == 3


def test_a_program_in_place_of_a_state_is_not_run(trainings, interrupted, tmp_path):
    """PyTorch 2.3 runs an archive of TorchScript in its interpreter, even with `weights_only`."""

    class Program(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.zeros(1)

        @torch.jit.export
        def __getstate__(self):
            return (self.x, True)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            self.x = state[0]
            self.training = state[1]
            assert False, "ran"  # noqa: B011, PT015

        def forward(self):
            return self.x

    folder = interrupted()
    torch.jit.script(Program()).save(str(folder / "weights" / "state.pt"))
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert "it cannot be read (UnreadableWeightsError)" in again.log
    assert len(again.results) == 2


def test_a_new_run_in_the_same_folder_is_not_mistaken_for_the_old(trainings, interrupted, tmp_path, power):
    folder = interrupted(name="train")
    assert (folder / "weights" / "state.pt").exists()
    new = trainings.train(
        tmp_path, mas=False, exist_ok=True, epochs=3, callbacks=power.cut_at(10), raises=power.CutError
    )
    assert new.folder == folder
    assert not (folder / "weights" / "state.pt").exists()


def test_a_checkpoint_that_is_named_is_gone_on_from(trainings, tmp_path, cut):
    run = cut(tmp_path, batch=10, epochs=4, save_period=1)
    assert (run.folder / "weights" / "state.pt").exists()
    again = trainings.train(tmp_path, run.folder / "weights" / "epoch0.pt", resume=True)
    assert again.trainer.start_epoch == 1


def test_a_run_that_was_cut_in_its_first_epoch_begins_it_again_where_its_state_is_lost(trainings, tmp_path, cut):
    run = cut(tmp_path, batch=2)
    assert not (run.folder / "weights" / "best.pt").exists()
    again = trainings.train(tmp_path, run.folder / "weights" / "last.pt", resume=True, batch=16)
    assert "resume: no epoch was complete: it begins anew" in again.log
    assert [row["epoch"] for row in again.results] == [1, 2]


def test_a_state_of_other_images_is_not_gone_on_from(trainings, tmp_path, cut):
    data = trainings.draw_data(tmp_path / "set", sizes=[(64, 64), (48, 80)])
    run = cut(tmp_path, data=data, batch=3)
    image = tmp_path / "set" / "images" / "0.png"
    image.rename(image.with_name("new.png"))
    again = trainings.train(tmp_path, run.folder / "weights" / "last.pt", resume=True)
    assert "checksum of their names" in again.log


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


def test_a_run_that_was_complete_stays_so(trainings, tmp_path, power):
    def fail(trainer):
        raise power.CutError

    run = trainings.train(tmp_path, bn_group=8, callbacks=[("on_train_end", fail)], raises=power.CutError)
    assert not (run.folder / "weights" / "state.pt").exists()
    assert latest_interrupted({"project": tmp_path, "name": run.folder.name}, "detect") is None


def test_one_process_trains_in_a_folder(trainings, interrupted, tmp_path):
    folder = interrupted()
    where = {"project": tmp_path, "name": "line"}
    code = (
        "import sys, pathlib; from yolov12.files import lock; "
        "kept = lock(pathlib.Path(sys.argv[1])); print(kept is not None, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, folder / "weights"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "True\n"
        assert latest_interrupted(where, "detect") is None
        with pytest.raises(ConfigError, match="another process trains in"):
            trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
        other.stdin.close()
    assert latest_interrupted(where, "detect") == folder / "weights" / "last.pt"


def test_an_empty_table_is_no_obstacle(trainings, interrupted, tmp_path):
    folder = interrupted()
    (folder / "results.csv").write_text("")
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert [row["epoch"] for row in again.results] == [2]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        ("1,5,0.1\n2,6,0.2\n3,7,0.3\n", "1,5,0.1\n2,6,0.2\n"),
        ("1,5,0.1\n2,6,0.2\n1", "1,5,0.1\n2,6,0.2\n"),  # epoch 10, cut off by a full disk
        ("1,5,0.1\n2,6,0.2\n\0\0\0\n", "1,5,0.1\n2,6,0.2\n"),  # zeros of a power cut
        ("1,5,0.1\n\n2,6,0.2\n\xff,\n", "1,5,0.1\n2,6,0.2\n"),
    ],
)
def test_damaged_rows_of_a_table_are_dropped(tmp_path, damage, kept):
    file = tmp_path / "results.csv"
    file.write_text(f"epoch,time,loss\n{damage}", encoding="latin-1")
    run_state.drop_rows(file, 2)
    assert file.read_text() == f"epoch,time,loss\n{kept}"


def whole_and_resumed(trainings, power, folder, *, cut_by, **arguments):
    """Return an uninterrupted run, and one that a callback interrupts and that is resumed."""
    whole = trainings.train(folder, **arguments)
    part = trainings.train(folder, callbacks=[cut_by], raises=power.CutError, **arguments)
    return whole, trainings.train(folder, part.folder / "weights" / "last.pt", resume=True)


def is_same(whole, resumed):
    weights = all(torch.equal(value, resumed.after[name]) for name, value in whole.after.items())
    average = whole.trainer.ema.ema.state_dict()
    return weights and all(torch.equal(v, average[k]) for k, v in resumed.trainer.ema.ema.state_dict().items())


def test_groups_are_arranged_as_they_were(trainings, power, tmp_path):
    """`auto` chooses the group with the first batch, but a resumed run knows it before."""
    cut_by = ("on_train_batch_end", lambda trainer: trainer.epoch and power.cut())
    whole, resumed = whole_and_resumed(trainings, power, tmp_path, cut_by=cut_by, micro_batch=2)
    assert whole.args["bn_group"] == 2
    assert is_same(whole, resumed)


def test_weights_of_two_heads_go_on_as_they_were(trainings, power, tiny_model, tmp_path):
    """The criterion changes at the end of an epoch, after the last step."""
    model = tmp_path / "two-heads.yaml"
    model.write_text(Path(tiny_model).read_text() + "end2end: True\nreg_max: 1\n")  # as YOLO26 has them
    cut_by = ("on_train_epoch_end", lambda trainer: trainer.epoch == 1 and power.cut())
    whole, resumed = whole_and_resumed(trainings, power, tmp_path, model=model, cut_by=cut_by, epochs=3, bn_group=8)
    criteria = [run.trainer.model.criterion for run in (whole, resumed)]
    assert criteria[0].updates == criteria[1].updates == 3
    assert is_same(whole, resumed)


def test_statistics_move_once_for_a_batch_whose_step_was_cut(trainings, power, tmp_path, monkeypatch):
    """The run is interrupted after the forward and backward pass, before the optimizer step."""
    step, batches = Engine.step, []

    def cut_after(engine, batch, *more, **options):
        result = step(engine, batch, *more, **options)
        batches.append(batch)
        if len(batches) == trainings.BATCHES * 2 + 6:
            raise power.CutError
        return result

    monkeypatch.setattr(Engine, "step", cut_after)
    whole, resumed = whole_and_resumed(
        trainings, power, tmp_path, cut_by=("on_train_start", lambda trainer: None), bn_group=8
    )
    assert len(batches) == trainings.BATCHES * 4 + 1
    assert is_same(whole, resumed)


def test_a_buffer_may_change_its_shape(trainings, power, tmp_path):
    """It is like a layer of the user's own that collects something."""

    def sets(entries):
        return lambda trainer: trainer.model.model[0].register_buffer("seen", torch.arange(entries(trainer)))

    callbacks = [
        ("on_pretrain_routine_end", sets(lambda trainer: 0)),
        ("on_train_epoch_start", sets(lambda trainer: trainer.epoch + 1)),
    ]
    run = trainings.train(tmp_path, callbacks=[*callbacks, *power.cut_at(6)], raises=power.CutError)
    found = []
    look = ("on_train_start", lambda trainer: found.append(trainer.model.model[0].seen))
    last = run.folder / "weights" / "last.pt"
    again = trainings.train(tmp_path, last, resume=True, callbacks=[*callbacks, look])
    assert found[0].tolist() == [0, 1]
    assert len(again.results) == 2


def test_a_run_whose_batch_stock_has_halved_goes_on_from_its_last_step(trainings, power, tmp_path):
    """After an out-of-memory, Ultralytics' loop begins its first epoch again, with another loader."""

    def fails_once(trainer):
        def loss(self, batch, preds=None):
            if len(batch["img"]) == 8:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return type(self).loss(self, batch, preds)

        trainer.model.loss = MethodType(loss, trainer.model)

    fails = ("on_train_start", fails_once)
    wanted = trainings.train(tmp_path, callbacks=[fails], epochs=1, amp=False)
    cut = {"callbacks": [fails, *power.cut_at(5)], "raises": power.CutError}
    run = trainings.train(tmp_path, **cut, epochs=1, amp=False)
    last = run.folder / "weights" / "last.pt"
    again = trainings.train(tmp_path, last, callbacks=[fails], resume=True)
    assert "resume: epoch 1, after batch 4 of 8" in again.log  # the last of two batches that are an update
    assert all(torch.equal(value, wanted.after[name]) for name, value in again.after.items())


def test_a_run_with_a_loader_of_the_users_own_around_ours_is_saved(trainings, power, tmp_path):
    class Around:
        def __init__(self, loader):
            self._loader = loader

        def __len__(self):
            return len(self._loader)

        def __iter__(self):
            return iter(self._loader)

        def __getattr__(self, name):
            return getattr(self._loader, name)

    wraps = ("on_train_start", lambda trainer: setattr(trainer, "train_loader", Around(trainer.train_loader)))
    cut = {"callbacks": [wraps, *power.cut_at(2)], "raises": power.CutError}
    run = trainings.train(tmp_path, **cut, epochs=1)
    assert (run.folder / "weights" / run_state.FILE).exists()


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
