"""`yolov12 watch` with a tiny model: images of a new class arrive, and a candidate that knows it is trained."""

import json
import shutil

import cv2
import numpy as np
import pytest
import yaml
from ultralytics import YOLO

from yolov12 import cli
from yolov12.watch import child, command, moves

TRAINING = ["epochs=1", "imgsz=64", "batch=8", "nbs=8", "workers=0", "device=cpu", "recipe=False", "plots=False"]


def deliver(inbox, name, class_id, seed):
    draw = np.random.default_rng(seed)
    cv2.imwrite(str(inbox / f"{name}.png"), draw.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    (inbox / f"{name}.txt").write_text(f"{class_id} 0.5 0.5 0.3 0.3\n")


class InThisProcess:
    """Runs the work of an attempt here, as a process of its own would load PyTorch each time."""

    def start(self, task, attempt, log):
        self.status = child.run(task, attempt)
        return self

    def poll(self):
        return self.status

    def stop(self):
        pass


@pytest.fixture
def factory(tmp_path, line, monkeypatch, capsys):
    """Folder with a data set, a serving model and an inbox whose images show a new class."""
    shutil.copytree(line, tmp_path / "line")
    data = yaml.safe_load((tmp_path / "line" / "data.yaml").read_text())
    (tmp_path / "line" / "data.yaml").write_text(yaml.safe_dump({**data, "path": str(tmp_path / "line")}))
    inbox = tmp_path / "in box"
    inbox.mkdir()
    (inbox / "classes.txt").write_text("odd\ncrack\n")
    for index in range(4):
        deliver(inbox, f"new{index}", index % 2, index)
    monkeypatch.setattr(command, "Processes", InThisProcess)

    def check(request):
        text = {"model": str(request.model), "data": request.data, "training": list(request.training)}
        capsys.readouterr()
        status = child.guarded(lambda: child.check(text))
        return status, json.loads(capsys.readouterr().out.splitlines()[-1]) if status == 0 else None

    monkeypatch.setattr(command, "_check", check)
    words = [f"data={tmp_path / 'line' / 'data.yaml'}", f"inbox={inbox}", f"model={tmp_path / 'line' / 'serving.pt'}"]
    return tmp_path, [*words, "min_images=2", "settle=0", "poll=0", "once", *TRAINING]


def test_a_new_class_is_trained_judged_and_reported(factory, capsys):
    folder, words = factory
    work = folder / "line" / "serving-watch"
    serving = folder / "line" / "serving.pt"
    before = serving.read_bytes()
    assert cli.main(["watch", *words, "margin=0.99"]) == 0
    printed = capsys.readouterr().out
    (attempt,) = (work / "history").iterdir()
    files = {file.name for file in attempt.iterdir()}
    assert {"before.pt", "candidate.pt", "verdict.json", "report.md", "report.json", "classes.csv"} <= files
    assert (attempt / "before.pt").read_bytes() == before
    verdict = json.loads((attempt / "verdict.json").read_text())
    assert [row["name"] for row in verdict["classes"]] == ["even", "odd", "crack"]
    assert YOLO(str(attempt / "candidate.pt")).names == {0: "even", 1: "odd", 2: "crack"}
    assert verdict["candidate"] == moves.digest(attempt / "candidate.pt")
    expected = (attempt / "candidate.pt").read_bytes() if verdict["promote"] else before
    assert serving.read_bytes() == expected
    assert ("is promoted" in printed) is verdict["promote"]
    assert yaml.safe_load((work / "dataset" / "data.yaml").read_text())["names"] == {0: "even", 1: "odd", 2: "crack"}
    labels = [file.read_text().split()[0] for file in (work / "dataset" / "labels").rglob("*.txt")]
    assert sorted(labels) == ["1", "1", "2", "2"]
    for word, message in (
        ("lr0=abc", "lr0"),
        ("device=7", "device=7"),
        ("mem_limit=lots", "mem_limit"),
        ("mas=False", "mas=False"),
    ):
        assert cli.main(["watch", *words, word]) == 2
        assert message in capsys.readouterr().err
    # Nothing has arrived since, so nothing is trained, whatever the outcome was.
    assert cli.main(["watch", *words]) == 0
    assert len([*(work / "history").iterdir()]) == 1


@pytest.mark.parametrize("lr0", [0.01, 1e-9], ids=["learned", "not learned"])
def test_a_candidate_that_learned_wrong_labels_is_not_promoted_and_the_report_says_what_fell(lr0, factory, monkeypatch):
    folder, words = factory
    data, serving, inbox = folder / "line", folder / "line" / "serving.pt", folder / "in box"
    before = serving.read_bytes()
    # Ultralytics' val adds a border to images of this size, with which this model finds nothing.
    monkeypatch.setattr(child, "_VAL_ARGUMENTS", (*child._VAL_ARGUMENTS, "rect"))
    for file in inbox.iterdir():
        file.unlink()
    for label in (data / "labels").glob("*.txt"):  # each object of one class gets the name of the other
        shutil.copy(data / "images" / f"{label.stem}.png", inbox)
        wrong = [f"{1 - int(line[0])}{line[1:]}" for line in label.read_text().splitlines()]
        (inbox / label.name).write_text("\n".join(wrong))
    plain = ["rect=False", "mosaic=0", "scale=0", "translate=0", "fliplr=0", "hsv_h=0", "hsv_s=0", "hsv_v=0"]
    slow = [f"lr0={lr0}", "optimizer=SGD", "warmup_epochs=0", "warmup_bias_lr=0", "freeze=9", "replay_fraction=0.05"]
    words = [word for word in words if not word.startswith(("epochs=", "batch=", "nbs="))]
    assert cli.main(["watch", *words, *plain, *slow, "epochs=4", "batch=4", "nbs=4"]) == 0
    (attempt,) = (data / "serving-watch" / "history").iterdir()
    report, text = json.loads((attempt / "report.json").read_text()), (attempt / "report.md").read_text()
    rows = {row["name"]: row for row in report["verdict"]["classes"]}
    assert all(row["serving"] > 0.5 for row in rows.values())
    if lr0 < 0.01:
        assert report["outcome"] == "promoted"
        return
    assert serving.read_bytes() == before
    assert report["outcome"] == "not promoted"
    fell = {name: (row["serving"], row["candidate"]) for name, row in rows.items()}
    assert all(then - now > 0.2 for then, now in fell.values())
    for name, (then, now) in fell.items():
        assert f"- {name} fell from {then:.3f} to {now:.3f}, more than the margin of 0.02." in text.splitlines()
        assert f"| {name} |  | 12 | {then:.3f} | {now:.3f} | {now - then:+.3f} |" in text.splitlines()
    assert "Look at the labels of the new images, above all at even, odd." in text
