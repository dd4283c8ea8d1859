"""The folder that the monitor takes, and how the run in it stands."""

import json
import os
from pathlib import Path

import pytest

from tests.monitor.run_files import arguments, end, line, old, write
from yolov12 import cli, files
from yolov12.errors import ConfigError
from yolov12.monitor import runs
from yolov12.monitor.follow import Follower
from yolov12.monitor.runs import find, state_of


def test_the_newest_run_is_the_default(tmp_path, monkeypatch):
    settings = tmp_path / "home" / "Ultralytics" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"runs_dir": str(tmp_path / "runs")}))
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match="nothing was trained yet"):
        find("")
    for age, name in enumerate(("new", "old")):
        folder = tmp_path / "runs" / "detect" / name
        folder.mkdir(parents=True)
        write(folder)
        os.utime(folder / "memory.csv", (1000 - age, 1000 - age))
    assert find("").name == "new"
    (tmp_path / "runs" / "detect" / "starting" / "weights").mkdir(parents=True)
    (tmp_path / "runs" / "detect" / "starting" / "weights" / ".lock").touch()
    assert find("").name == "starting"
    assert find(str(tmp_path / "runs" / "detect" / "old" / "memory.csv")).name == "old"


def test_a_training_without_the_engine_is_told_as_such(tmp_path, monkeypatch, capsys):
    """It was trained, and no memory.csv will come."""
    monkeypatch.setattr(runs, "_runs_dir", lambda: tmp_path)
    stock = arguments(tmp_path / "detect" / "train", mas="false")
    for words in ([], [str(stock)], [f"{stock / 'memory.csv'}"]):
        assert cli.main(["monitor", *words]) == 0
        out = capsys.readouterr().out
        assert out == "train · a training without the engine (mas=False), so it writes no memory.csv\n"
    assert find("") == stock
    assert old(write(arguments(tmp_path / "detect" / "train2"))) == find("")  # older, and with an engine


def test_a_run_that_the_engine_does_not_support_is_not_starting_for_ever(tmp_path):
    arguments(tmp_path)
    (tmp_path / "weights").mkdir()
    lock = files.lock(tmp_path / "weights")
    assert state_of(tmp_path, steps=0).text == "starting: no step was made yet"
    (tmp_path / "results.csv").touch()  # an epoch was completed
    assert state_of(tmp_path, steps=0).text.startswith("a training without the engine")
    lock.release()


def test_a_folder_that_is_no_training_is_one_error_with_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/detect/val").mkdir(parents=True)
    Path("runs/detect/val/BoxPR_curve.png").touch()
    train = arguments(Path("runs/detect/train"))
    for folder, way_out in [
        ("runs", f"Give one, such as {train}"),
        ("runs/detect", f"Give one, such as {train}"),
        ("runs/detect/val", "A training prints its folder when it begins"),
    ]:
        assert cli.main(["monitor", folder]) == 2
        said = capsys.readouterr().err
        assert said == f"yolov12: error: {folder} is not the folder of a training. {way_out}\n"
    assert cli.main(["monitor", "runs/detect/train"]) == 0


def test_without_settings_ultralytics_is_asked(tmp_path, monkeypatch):
    from ultralytics.utils import SETTINGS

    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    assert runs._runs_dir() == tmp_path / "runs"


@pytest.mark.parametrize(
    ("made", "said", "ended"),
    [
        (lambda folder: arguments(folder), "starting: no memory.csv yet", False),
        (lambda folder: old(arguments(folder)), "no memory.csv yet: it is starting, or was interrupted", False),
        (lambda folder: old(arguments(folder, mas="false")), "a training without the engine (mas=False)", True),
        (lambda folder: arguments(folder, mas="false"), "a training without the engine (mas=False)", True),
        (lambda folder: arguments(folder, mas=None), "a training without the engine", True),  # stock Ultralytics
        (lambda folder: (arguments(folder) / "results.csv").touch(), "a training without the engine", True),
        (lambda folder: write(folder, line(1), name="memory.rank1.csv"), "running", False),
        (lambda folder: write(folder), "starting: no step was made yet", False),
        (lambda folder: write(folder, line(1)), "running", False),
        (lambda folder: end(write(folder, line(1))), "ended after 3 updates", True),
        (lambda folder: end(write(folder, line(1)), 3, 9), "ended after 3 of 9 updates", True),
        (lambda folder: os.utime(write(folder, line(1)) / "memory.csv", (0, 0)), "interrupted: resume=auto", True),
    ],
)
def test_how_a_run_stands(tmp_path, made, said, ended):
    made(tmp_path)
    follower = Follower(tmp_path)
    follower.read()
    assert follower.state().text.startswith(said)
    assert follower.state().ended is ended


def test_a_new_run_may_remove_the_files_of_the_old_one_at_any_time(tmp_path, monkeypatch):
    end(write(tmp_path, line(1)))
    stock = Path.stat

    def remove(path, **options):
        found = stock(path, **options)
        if path.parent == tmp_path:  # and nothing else: a traceback looks at the source files of Python
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", remove)
    assert state_of(tmp_path, steps=1).text == "ended"


def test_a_run_that_holds_its_lock_runs_however_long_a_step_takes(tmp_path):
    write(tmp_path, line(1))
    end(tmp_path)
    (tmp_path / "weights").mkdir()
    lock = files.lock(tmp_path / "weights")
    assert state_of(tmp_path, steps=1).text == "running"
    lock.release()
    assert state_of(tmp_path, steps=1).ended


def test_looking_for_the_lock_of_another_process_takes_none(tmp_path, monkeypatch):
    lock = files.lock(tmp_path)
    child = os.fork()
    if not child:
        monkeypatch.setattr(files.fcntl, "lockf", None)
        os._exit(17 if files.is_locked(tmp_path) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    lock.release()
    assert not files.is_locked(tmp_path)
