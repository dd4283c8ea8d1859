"""One training at a time in a run folder: the second one is refused before it changes anything."""

import shutil
import threading
from types import SimpleNamespace

import pytest
from ultralytics import YOLO, cfg
from ultralytics.utils import YAML

from yolov12 import files
from yolov12.errors import ConfigError, FolderInUseError
from yolov12.training.run import run_folder


def in_a_thread(work):
    """Return the error of some work that is done in another thread."""
    errors = []

    def run():
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors[0] if errors else None


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("event", ["on_train_start", "on_fit_epoch_end"])
def test_a_second_thread_is_refused_and_the_first_one_does_not_notice(trainings, tiny_model, tmp_path, event):
    """The second training would delete what the first one has written, also where that has not begun an epoch."""
    settings = {**trainings.TINY, "project": tmp_path, "name": "line", "exist_ok": True}
    refused = []

    def second(trainer):
        before = contents(trainer.save_dir)
        refused.append(in_a_thread(lambda: YOLO(tiny_model).train(**settings)))
        assert contents(trainer.save_dir) == before

    run = trainings.train(tmp_path, name="line", exist_ok=True, callbacks=[(event, second)])
    assert {type(error) for error in refused} == {FolderInUseError}
    assert f"another process trains in {run.folder}, or another thread" in str(refused[0])
    assert len(run.results) == 2
    assert run.summary["updates"] == 2 * trainings.BATCHES
    assert not (run.folder / "weights" / ".lock").exists()
    assert not files.is_locked(run.folder / "weights")
    assert len(trainings.train(tmp_path, name="line", exist_ok=True, epochs=1).results) == 1


def test_a_second_process_is_refused_before_it_changes_anything(trainings, interrupted, start_script, tmp_path):
    folder = interrupted()
    script = tmp_path / "other.py"
    script.write_text(
        "import sys; from pathlib import Path; from yolov12.files import lock\n"
        "kept = lock(Path(sys.argv[1])); print(kept is not None, flush=True); sys.stdin.read()"
    )
    other = start_script(script, folder / "weights")
    assert other.stdout.readline() == "True\n"
    before = contents(folder)
    for how in ({"resume": str(folder / "weights" / "last.pt")}, {"name": "line", "exist_ok": True}):
        trainings.train(tmp_path, **how, raises=ConfigError)
        assert contents(folder) == before
    other.communicate()
    assert len(trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True).results) == 2


def test_of_two_that_find_the_same_free_name_one_takes_the_next(tmp_path, monkeypatch):
    """Both look for a free name before either has made its folder."""
    names = iter(["line", "line-2"])
    monkeypatch.setattr(cfg, "get_save_dir", lambda args: tmp_path / next(names))
    (tmp_path / "line" / "weights").mkdir(parents=True)
    taken = files.lock(tmp_path / "line" / "weights")
    trainer = SimpleNamespace(args=SimpleNamespace(mas=True, exist_ok=False))
    with run_folder.locked_while_made():
        run_folder.reserve(trainer)
        assert trainer.save_dir == tmp_path / "line-2"
        assert files.is_locked(trainer.save_dir / "weights")
    assert not files.is_locked(trainer.save_dir / "weights")
    taken.release()


def test_a_training_that_fails_or_is_only_prepared_leaves_no_lock(trainings, tiny_model, tmp_path):
    from ultralytics.models.yolo.detect import DetectionTrainer

    where = {"project": tmp_path, "name": "line", "exist_ok": True}
    settings = {key: value for key, value in trainings.TINY.items() if key != "recipe"}
    fail = ("on_train_start", lambda trainer: 1 / 0)
    trainings.train(tmp_path, name="line", exist_ok=True, callbacks=[fail], raises=ZeroDivisionError)
    prepared, other = (DetectionTrainer(overrides={**settings, **where, "model": tiny_model}) for _ in range(2))
    prepared.train()
    assert other.save_dir == prepared.save_dir
    assert len((prepared.save_dir / "results.csv").read_text().splitlines()) == 1 + 2


def _remove_arguments(trainer):
    (trainer.save_dir / "args.yaml").unlink()


def _remove_folder(trainer):
    shutil.rmtree(trainer.save_dir)


def _choose_another(trainer):
    trainer.save_dir = trainer.save_dir.parent / "another"
    trainer.wdir = trainer.save_dir / "weights"
    trainer.wdir.mkdir(parents=True)
    trainer.last, trainer.best = trainer.wdir / "last.pt", trainer.wdir / "best.pt"
    trainer.csv = trainer.save_dir / "results.csv"


@pytest.mark.parametrize(
    ("event", "change"),
    [
        ("on_train_start", _remove_arguments),
        ("on_train_start", _remove_folder),
        ("on_pretrain_routine_start", _choose_another),
    ],
)
def test_a_folder_that_a_callback_changes_is_no_obstacle(trainings, tiny_model, tmp_path, event, change):
    run = trainings.train(tmp_path, tiny_model, epochs=1, callbacks=[(event, change)])
    assert run.steps == trainings.BATCHES
    assert (run.folder / "weights" / "last.pt").exists()
    assert run.trainer.args.bn_group == 32


def test_arguments_are_whole_if_the_group_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text("batch: 8\nbn_group: null\n")
    trainer = SimpleNamespace(args=SimpleNamespace(bn_group=None), save_dir=tmp_path)

    def full(path, data):
        path.write_text("batch:")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ultralytics.utils.YAML.save", full)
        with pytest.raises(OSError, match="No space left"):
            run_folder.keep_group(trainer, 4, is_first=True)
    assert file.read_text() == "batch: 8\nbn_group: null\n"
    trainer.args.bn_group = None
    run_folder.keep_group(trainer, 4, is_first=True)
    assert YAML.load(file) == {"batch": 8, "bn_group": 4}


@pytest.mark.parametrize(("event", "stays"), [("on_train_start", False), ("on_train_batch_end", True)])
def test_the_folder_of_a_run_stays_if_a_batch_has_run(trainings, power, tmp_path, event, stays):
    """An error may come before the first update. What the user finds does not depend on how many batches it takes."""
    run = trainings.train(tmp_path, nbs=32, callbacks=[(event, power.cut)], raises=power.CutError, name="line")
    assert (tmp_path / "line").is_dir() == stays
    assert not stays or run.args["nbs"] == 32


@pytest.mark.parametrize(
    ("event", "more", "says"),
    [
        ("on_train_start", {}, False),
        ("on_train_batch_end", {"nbs": 32}, False),
        ("on_train_batch_end", {}, True),
        ("on_train_batch_end", {"save": False}, False),
        ("on_train_end", {}, False),
    ],
    ids=["before a batch", "before an update", "after an update", "without saves", "complete"],
)
def test_a_run_that_fails_says_how_it_goes_on_if_it_is_saved(trainings, power, tmp_path, event, more, says):
    run = trainings.train(tmp_path, epochs=1, callbacks=[(event, power.cut)], raises=power.CutError, **more)
    assert ("this run is saved: it goes on with the same command and resume=auto" in run.log) == says
