"""The story of the inspection line, with a tiny model; with `--deep`, with the model of the demonstration."""

import json
from dataclasses import replace

import pytest
from ultralytics import YOLO

from benchmarks import line
from benchmarks.line_story import NEW
from yolov12.demo.board import class_names

TINY = replace(
    line.SMALL,
    imgsz=64,
    drawn=("demo:images=60,seed=2,val=0.2",),
    epochs=8,
    close_mosaic=3,
    kill_at=0.25,
    save_every="1",
    settle="0.2s",
    patience_s=800.0,
)


def test_the_watch_trains_and_promotes_although_everything_is_killed(tiny_model, tmp_path):
    folder = tmp_path / "line"
    folder.mkdir()
    yolo = YOLO(tiny_model)  # it finds nothing
    yolo.model.names = dict(enumerate([*class_names(hold_back=NEW), "other", "another"]))
    yolo.save(folder / "base.pt")
    found = line.tell_all(TINY, ["watch"], folder, tmp_path / "line.json")
    assert json.loads((tmp_path / "line.json").read_text()) == json.loads(json.dumps(found))
    # A model that is trained for seconds finds nothing. How long two restarts take is a matter of the machine: what
    # the kill costs is counted in updates.
    promises = {name: held for name, held in found["holds"].items() if not name.startswith(("new_", "less_than_a"))}
    assert all(promises.values()), found
    told = found["watch"]
    assert told["killed_after_update"] <= told["resumed_at_update"] <= told["killed_after_update"] + 1
    assert 1 < told["resumed_at_update"] < told["updates"] == TINY.epochs
    assert len(told["set_aside"]) == TINY.damaged
    assert [row["model"] for row in found["table"]] == ["watch"]


@pytest.mark.deep
def test_the_small_story_in_all_its_parts(tmp_path):
    found = line.tell_all(line.SMALL, line.PARTS, tmp_path / "line", tmp_path / "line.json")
    assert all(found["holds"][name] for name in ("less_than_a_minute_lost", "nobody_touched_it", "no_image_lost"))
    assert [row["model"] for row in found["table"]] == ["watch", "without_replay"]
    assert [row["old_before"] for row in found["table"]] == [pytest.approx(found["table"][0]["old_before"])] * 2
    assert len(found["watch"]["table"]["classes"]) == 10
