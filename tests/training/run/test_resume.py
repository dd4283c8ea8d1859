"""Resuming runs: which run `resume=auto` continues, and what goes on as it was."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import YAML
from ultralytics.utils.torch_utils import strip_optimizer

from yolov12.errors import ConfigError, DataError, UnreadableWeightsError, UntrustedWeightsError
from yolov12.files import lock
from yolov12.mas import Engine, compile_ahead
from yolov12.models import weights
from yolov12.training.run import run_state, session
from yolov12.training.run.resume import begun, latest_interrupted


def test_kernels_are_compiled_ahead_until_the_first_batch_after_those_that_are_skipped(
    interrupted, trainings, tmp_path, monkeypatch
):
    told, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda *args, **options: (told.append("step"), step(*args, **options))[1])
    monkeypatch.setattr(compile_ahead, "end", lambda: told.append("end"))
    trainings.train(tmp_path, interrupted() / "weights" / "last.pt", resume=True)
    assert told[:2] == ["step", "end"]


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


@pytest.mark.parametrize("trust", ["0", "1"])
def test_auto_leaves_out_a_checkpoint_that_is_damaged(trainings, interrupted, tmp_path, monkeypatch, caplog, trust):
    """A full disk or a power cut may leave one, and nobody may be there when the job is started again."""
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", trust)
    name = {"project": tmp_path, "name": "line"}
    first = interrupted() / "weights" / "last.pt"
    empty, half = (tmp_path / f"line-{number}" / "weights" / "last.pt" for number in (2, 3))
    for file, content in ((half, first.read_bytes()[:5000]), (empty, b"")):
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    half.with_name("state.pt").touch()
    for number, file in enumerate((first.with_name("state.pt"), first, half, half.with_name("state.pt"), empty)):
        os.utime(file, (number, number))  # the latest is the empty one
    assert latest_interrupted(name, "detect", quiet=True) == first
    assert not caplog.records

    again = trainings.train(resume="auto", **name, **trainings.TINY)
    assert again.folder == first.parents[1]
    assert len(again.results) == 2
    told = [line for line in again.log.splitlines() if "left out" in line]
    assert len(told) == 2
    assert f"resume=auto: the newest run of this name is left out: {empty} cannot be read" in told[0]
    assert f"resume=auto: a run of this name is left out: {half} cannot be read" in told[1]


def test_auto_stops_at_a_checkpoint_that_may_be_whole_or_whose_folder_it_would_take(interrupted, tmp_path, monkeypatch):
    name = {"project": tmp_path, "name": "line"}
    last = interrupted() / "weights" / "last.pt"
    os.utime(interrupted(name="line-2") / "weights" / "last.pt", (0, 0))
    os.utime(tmp_path / "line-2" / "weights" / "state.pt", (0, 0))
    read, causes = weights.read, [OSError(errno.EIO, "Input/output error"), MemoryError()]
    failures = [UntrustedWeightsError("code"), *(UnreadableWeightsError("unreadable") for _ in causes)]
    for error, cause in zip(failures, [None, *causes], strict=True):
        error.__cause__ = cause

        def fail(file, error=error):
            if file == last:
                raise error
            return read(file)

        with monkeypatch.context() as patch:
            patch.setattr(weights, "read", fail)
            with pytest.raises(type(error)):
                latest_interrupted(name, "detect")
    last.write_bytes(b"")
    assert latest_interrupted({**name, "exist_ok": True}, "detect") == tmp_path / "line-2" / "weights" / "last.pt"
    shutil.rmtree(tmp_path / "line-2")
    assert latest_interrupted(name, "detect") is None  # a new run has a folder of its own
    for choice in ({"exist_ok": True}, {"save_dir": str(tmp_path / "line")}):
        with pytest.raises(UnreadableWeightsError, match=r"last\.pt cannot be read"):
            latest_interrupted({**name, **choice}, "detect")


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
