"""A training for other classes than before: what it says, and its table of classes."""

from pathlib import Path

import pytest
import torch
import yaml
from ultralytics import YOLO

from yolov12.training.classes import table

NAMES = {0: "new", 1: "odd"}
REPLAY = {"replay_fraction": 0.5, "batch": 4, "nbs": 4}


@pytest.fixture(scope="module")
def old(tmp_path_factory, tiny_model, trainings):
    """Folder with a model for the classes `even` and `odd`, their data, and data in which the first class is new."""
    folder = tmp_path_factory.mktemp("old")
    trainings.draw_data(folder / "old")
    data = Path(trainings.draw_data(folder / "new"))
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "names": NAMES}))
    model = YOLO(tiny_model)
    model.model.names = {0: "even", 1: "odd", **{index: f"other {index}" for index in range(2, 10)}}
    model.save(folder / "old.pt")
    return folder


class PowerCutError(Exception):
    """Power cut in mid-epoch."""


def cut_power(trainer):
    if trainer.epoch == 1:
        raise PowerCutError


def test_a_training_with_new_classes_makes_a_table_which_a_resumed_run_completes(old, trainings, tmp_path):
    validated = []
    settings = {"data": str(old / "new" / "data.yaml"), "replay": str(old / "old" / "data.yaml"), **REPLAY}
    cut = trainings.train(
        tmp_path,
        str(old / "old.pt"),
        **settings,
        callbacks=[("on_train_batch_end", cut_power), ("on_val_end", validated.append)],
        raises=PowerCutError,
    )
    assert (
        "classes: 1 of 2 classes keep their weights, found by name; new: new; no longer there: even, other 2" in cut.log
    )
    assert "replay: 8 new images and 8 of 8 old ones (50%) in each epoch" in cut.log
    assert "replay: labels of classes that the data does not have are left out: even (" in cut.log
    assert len(validated) == 1  # the callbacks of a user see the validations of the training alone
    assert len(cut.memory) == 5
    rows = table.read(cut.folder / "classes.csv")
    assert [(row.name, row.known, row.after) for row in rows] == [("new", False, None), ("odd", True, None)]
    assert rows[0].before is None
    assert rows[1].before is not None
    assert rows[1].objects > rows[0].objects > 0  # the validation images of both

    marked = [rows[0], table.replace(rows[1], before=(0.25, 0.125))]
    table.write(cut.folder / "classes.csv", marked)
    moved = (old / "old").rename(old / "moved")
    text = (moved / "data.yaml").read_text()
    (moved / "data.yaml").write_text(text.replace(str(old / "old"), str(moved)))
    where = {"replay": str(moved / "data.yaml")}
    run = trainings.train(tmp_path, cut.folder / "weights" / "last.pt", resume=True, replay_fraction=0.1, **where)
    moved.rename(old / "old")
    (old / "old" / "data.yaml").write_text(text)
    assert "replay_fraction=0.1: a run goes on with the replay_fraction=0.5 it began with" in run.log
    assert "validating the model that the training begins with" not in run.log
    done = table.read(run.folder / "classes.csv")
    assert [row.before for row in done] == [None, (0.25, 0.125)]
    assert all(row.after is not None for row in done)
    assert (run.folder / "classes.png").exists()
    assert table.as_text(done) in run.log
    assert len(run.memory) == 8


def test_the_same_classes_make_no_table(old, trainings, tmp_path):
    same = YOLO(str(old / "old.pt"))
    data = yaml.safe_load((old / "old" / "data.yaml").read_text())
    (old / "old" / "same.yaml").write_text(yaml.safe_dump({**data, "names": same.names}))
    run = trainings.train(tmp_path, same, data=str(old / "old" / "same.yaml"), epochs=1)
    assert "classes" not in [path.stem for path in run.folder.iterdir()]
    assert "classes:" not in run.log


def test_a_class_that_was_renamed_keeps_its_weights_if_the_user_says_so(old, trainings, tmp_path):
    began = {}

    def note(trainer):
        began.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

    data = yaml.safe_load((old / "old" / "data.yaml").read_text())
    (old / "old" / "renamed.yaml").write_text(yaml.safe_dump({**data, "names": ["odds", "even"]}))
    settings = {"data": str(old / "old" / "renamed.yaml"), "epochs": 1, "val": False}
    events = [("on_train_start", note)]
    plain = trainings.train(tmp_path, str(old / "old.pt"), **settings, callbacks=events)
    assert "a class that was only renamed keeps its weights with rename=\"{'odd': 'odds'}\"" in plain.log
    weights = YOLO(str(old / "old.pt")).model.state_dict()
    row = next(name for name in weights if name.endswith(".cv3.0.2.weight"))
    assert not torch.equal(began[row][0], weights[row][1])
    events.append(("on_train_epoch_end", lambda trainer: (trainer.save_dir / "classes.csv").unlink()))  # tidies up
    run = trainings.train(tmp_path, str(old / "old.pt"), **settings, callbacks=events, rename={"odd": "odds"})
    assert "classes: 2 of 2 classes keep their weights, found by name; renamed: odd to odds; no longer there" in run.log
    assert "only renamed" not in run.log
    assert torch.equal(began[row], weights[row][[1, 0]])
    assert [row.known for row in table.read(run.folder / "classes.csv")] == [True, True]
    assert run.args["rename"] == {"odd": "odds"}
