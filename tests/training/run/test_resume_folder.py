"""The folder in which a resumed run goes on, and the arguments that it refuses before it changes anything there."""

from pathlib import Path

import pytest
from ultralytics import YOLO
from ultralytics.cfg import entrypoint
from ultralytics.models.yolo.detect import DetectionTrainer

from yolov12 import cli
from yolov12.errors import ConfigError, NothingToResumeError


def snapshot(folder):
    """Return path → size and time of every file."""
    return {
        path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SPELLINGS = {
    "Python, True": lambda folder, _: YOLO(folder / "weights" / "last.pt").train(resume=True),
    "Python, path": lambda folder, yaml: YOLO(yaml).train(resume=str(folder / "weights" / "last.pt")),
    "Python, relative": lambda folder, _: YOLO(f"{folder.name}/weights/last.pt").train(resume=True),
    "yolo, model": lambda folder, _: entrypoint(f"train resume model={folder.name}/weights/last.pt"),
    "yolov12, model": lambda folder, _: cli.main(["train", f"model={folder}/weights/last.pt", "resume=True"]),
    "yolov12, path": lambda folder, _: cli.main(["train", f"resume={folder.name}/weights/last.pt"]),
    "Python, auto": lambda folder, yaml: YOLO(yaml).train(resume="auto", project=folder.parent, name=folder.name),
    "yolov12, auto": lambda folder, yaml: cli.main(
        ["train", f"model={yaml}", "resume=auto", f"project={folder.parent}", f"name={folder.name}"]
    ),
}


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_copied_run_goes_on_in_the_copy(interrupted, tiny_model, tmp_path, monkeypatch, spelling, has_state):
    """The checkpoint names the folder in which the run began, where the original still is."""
    copy = interrupted()
    if not has_state:
        (copy / "weights" / "state.pt").unlink()
    original = Path(YOLO(copy / "weights" / "last.pt").ckpt["train_args"]["save_dir"])
    before = snapshot(original)
    assert original != copy
    monkeypatch.chdir(tmp_path)
    assert SPELLINGS[spelling](copy, tiny_model) in (0, None) or spelling.startswith("Python")
    assert [path.name for path in tmp_path.iterdir()] == ["line"]
    assert len((copy / "results.csv").read_text().splitlines()) == 1 + 2
    settings = (copy / "args.yaml").read_text()
    assert all(f"{line}\n" in settings for line in (f"save_dir: {copy}", "batch: 8", "imgsz: 64"))
    assert snapshot(original) == before


def test_a_folder_that_is_given_is_used(interrupted, tmp_path):
    """Ultralytics lets a resumed run write elsewhere."""
    folder = interrupted()
    before = snapshot(folder)
    YOLO(folder / "weights" / "last.pt").train(resume=True, save_dir=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "weights" / "best.pt").exists()
    assert snapshot(folder) == before


BAD = {
    "imgsz": [0, -32, "big", 64.5],
    "device": [99],
    "data": ["missing.yaml"],
    "batch": ["x", 1.5],
    "workers": ["x"],
    "epochs": ["x"],
    "save_every": ["soon"],
    "mas_data": ["sometimes"],
    "auto_workers": ["sometimes"],
    "mem_limit": ["much"],
    "nonsense": [1],
}


def refusal(model, **arguments):
    try:
        YOLO(model).train(**arguments)
    except Exception as error:
        return type(error)
    raise AssertionError(arguments)


def test_bad_arguments_are_refused_as_in_a_new_run_and_change_nothing(trainings, interrupted, tiny_model, tmp_path):
    folder = interrupted()
    before = snapshot(folder)
    for name, values in BAD.items():
        for value in values:
            new = refusal(tiny_model, **{**trainings.TINY, "project": tmp_path / "new", name: value})
            assert refusal(folder / "weights" / "last.pt", resume=True, **{name: value}) is new, (name, value)
            assert snapshot(folder) == before, (name, value)
    assert not (tmp_path / "new").exists()


def test_micro_batches_smaller_than_the_group_of_the_run_are_refused_and_change_nothing(interrupted):
    """The group stays, whatever is given, so the advice for a new run would not help."""
    folder = interrupted()
    before = snapshot(folder)
    for more in ({}, {"bn_group": 4}):
        with pytest.raises(ConfigError, match=r"began with bn_group=8, .* give at least micro_batch=8, leave it out"):
            YOLO(folder / "weights" / "last.pt").train(resume=True, micro_batch=4, **more)
        assert snapshot(folder) == before
    YOLO(folder / "weights" / "last.pt").train(resume=True, micro_batch=8)


def test_a_run_that_is_complete_is_refused_before_anything_is_read(interrupted, monkeypatch, capsys):
    folder = interrupted()
    last = folder / "weights" / "last.pt"
    YOLO(last).train(resume=True)
    before = snapshot(folder)
    monkeypatch.setattr(DetectionTrainer, "get_dataset", lambda _: pytest.fail("the data are read"))
    with pytest.raises(
        NothingToResumeError,
        match=r"last\.pt: there is nothing to resume: this training is complete.* model=.*last\.pt with data=",
    ):
        YOLO(last).train(resume=str(last))
    assert cli.main(["train", f"model={last}", "resume=True"]) == 2
    assert "this training is complete" in capsys.readouterr().err
    assert snapshot(folder) == before
