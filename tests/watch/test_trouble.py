"""What may happen to a watch that runs unattended for months, each with the way in which it goes on."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from tests.watch.factory import Work, go_to
from yolov12.errors import ConfigError
from yolov12.watch import child, command, loop, moves, state_file
from yolov12.watch.collection import Collection
from yolov12.watch.phases import Kind, Phase, State
from yolov12.watch.promotion import promote


def test_images_of_a_new_class_that_others_used_up_count_until_it_has_enough(factory):
    (factory.inbox / "classes.txt").write_text("missing\ndent\n")
    factory.deliver(3, label="1 0.5 0.5 0.1 0.1")
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    factory.deliver(label="1 0.5 0.5 0.1 0.1")
    assert factory.watch(Work()).run() == 0
    reasons = [json.loads((each / "attempt.json").read_text())["reason"] for each in factory.attempts()]
    assert reasons == ["4 new images of 'missing'", "4 images of the new class 'dent'"]
    factory.deliver(3, label="1 0.5 0.5 0.1 0.1")
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 2


def test_once_takes_all_images_however_many_there_are(factory, monkeypatch):
    monkeypatch.setattr(loop, "_PAIRS_AT_ONCE", 2)
    factory.deliver(7)
    assert factory.watch(Work(), "min_images=100").run() == 0
    assert not [*factory.inbox.glob("*.png")]
    assert factory.attempts() == []


def test_images_that_cannot_be_moved_do_not_keep_others_from_being_taken(factory, monkeypatch, capsys):
    monkeypatch.setattr(loop, "_PAIRS_AT_ONCE", 2)
    factory.deliver(7)
    stock = os.rename

    def rename(source, target):
        if Path(source).name in ("0.txt", "1.txt", "2.txt"):
            raise PermissionError(13, "not yours", str(source))
        stock(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert factory.watch(Work()).run() == 1
    assert sorted(file.name for file in factory.inbox.glob("*.png")) == ["0.png", "1.png", "2.png"]
    assert len(factory.attempts()) == 1
    assert capsys.readouterr().out.count("0.png stays in the inbox") == 1


def test_an_image_that_stays_behind_its_label_does_not_keep_others_from_being_taken(factory, monkeypatch, capsys):
    factory.deliver(5)
    stock = os.rename

    def rename(source, target):
        if Path(source).name == "0.png":
            raise PermissionError(1, "not yours", str(source))
        stock(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        factory.watch(Work()).step()
        assert factory.watch(Work()).run() == 1
    assert [file.name for file in factory.inbox.iterdir()] == ["0.png"]
    assert len(factory.attempts()) == 1
    assert "0.png stays in the inbox" in capsys.readouterr().out
    assert factory.watch(Work()).run() == 0  # somebody has given it to us
    assert [*factory.inbox.iterdir()] == []


def test_strange_names_are_no_trouble(factory, capsys):
    factory.deliver(4)
    for stem in (b"\xff", b"a\nforged"):
        for suffix in (b".png", b".txt"):
            Path(os.fsdecode(os.fsencode(factory.inbox) + b"/" + stem + suffix)).write_bytes(b"x")
    assert factory.watch(Work()).run() == 0
    notes = [note.read_text() for note in (factory.work / "rejected").glob("*.reason.txt")]
    assert sorted(note.partition(": ")[0] for note in notes) == ["\\udcff.png", "a\\nforged.png"]
    assert not [line for line in capsys.readouterr().out.splitlines() if "  forged" in line]


def test_an_attempt_goes_on_while_the_inbox_is_away(factory, capsys):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    away = factory.inbox.rename(factory.folder / "away")
    assert watch.run() == 1
    assert watch.state.phase is Phase.IDLE
    assert factory.serving.read_text().startswith("candidate")
    assert "No such file" in capsys.readouterr().out
    away.rename(factory.inbox)
    assert factory.watch(Work()).run() == 0


def test_a_data_set_that_is_away_delays_an_attempt_and_is_no_failure_of_it(factory, capsys):
    data = factory.folder / "line.yaml"
    data.touch()
    factory.deliver(4)
    watch = factory.watch(work := Work(), data=data, places=[str(data)])
    go_to(watch, Phase.TRAINING)
    watch.step()
    data.unlink()
    work.status = 2
    for _ in range(3):
        assert watch.step() is not Kind.WAIT
        factory.now += 60
    assert (watch.state.phase, watch.state.failures) == (Phase.TRAINING, 0)
    assert "the data set is not there" in capsys.readouterr().out
    data.touch()
    assert watch.run() == 0
    assert json.loads((watch.attempt / "report.json").read_text())["outcome"] == "promoted"


def test_an_attempt_goes_on_with_a_data_set_that_was_moved(factory):
    factory.deliver(4)
    go_to(factory.watch(Work(), data="old.yaml"), Phase.TRAINING)
    assert factory.watch(Work(), data="moved.yaml").run() == 0
    assert json.loads((factory.attempts()[0] / "attempt.json").read_text())["data"] == "moved.yaml"


def test_without_the_state_file_all_images_are_new(factory):
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    (factory.work / "state.json").unlink()
    factory.now += 60
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 2
    assert len(json.loads((factory.attempts()[-1] / "attempt.json").read_text())["new_images"]) == 4


@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.REPORTING])
def test_a_folder_of_an_attempt_that_was_removed_does_not_stop_the_watch(phase, factory, capsys):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, phase)
    shutil.rmtree(watch.attempt)
    assert factory.watch(Work()).run() == 0
    assert factory.serving.read_text().startswith("candidate")
    assert "the folder of attempt 1 is gone" in capsys.readouterr().out


def test_a_verdict_is_not_for_a_candidate_of_other_images(factory):
    factory.deliver(4)
    watch = factory.watch(Work(better=True))
    go_to(watch, Phase.JUDGING)
    assert (watch.attempt / "verdict.json").exists()
    (watch.attempt / "attempt.json").unlink()
    work = Work(better=False)
    assert factory.watch(work).run() == 0
    assert work.started == ["training", "judging", "reporting"]
    assert factory.serving.read_text() == "first"


def test_an_inbox_that_cannot_be_written_to_is_refused(factory, monkeypatch):
    def lock(folder):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(command.files, "lock", lock)
    with pytest.raises(ConfigError, match="inbox cannot be written to, and the watch moves images: Read-only"):
        command._lock(factory.inbox)


def test_a_serving_model_that_is_being_written_is_waited_for(factory):
    factory.deliver(4)
    for file in factory.inbox.iterdir():
        os.utime(file, (0, 0))
    watch = factory.watch(Work(), "settle=10s")
    factory.now = factory.serving.stat().st_mtime + 3
    assert [watch.step(), watch.step(), watch.step()] == [Kind.BEGIN, Kind.WAIT_FOR_WORK, Kind.WAIT_FOR_WORK]
    assert not (watch.attempt / "before.pt").exists()
    factory.serving.write_text("whole")
    factory.now = time.time() + 20
    assert watch.run() == 0
    assert (watch.attempt / "before.pt").read_text() == "whole"


def test_a_promoted_model_keeps_the_permissions_of_the_one_before(factory):
    factory.serving.chmod(0o664)
    factory.deliver(4)
    mask = os.umask(0o077)
    try:
        assert factory.watch(Work()).run() == 0
    finally:
        os.umask(mask)
    assert factory.serving.read_text().startswith("candidate")
    assert factory.serving.stat().st_mode & 0o777 == 0o664


def test_a_model_that_is_replaced_during_the_promotion_stays(tmp_path, monkeypatch):
    candidate, serving, before = (tmp_path / name for name in ("candidate.pt", "best.pt", "before.pt"))
    candidate.write_text("new")
    for file in (serving, before):
        file.write_text("old")
    stock = shutil.copyfile

    def copy(source, target):
        stock(source, target)
        serving.write_text("by hand")

    monkeypatch.setattr(shutil, "copyfile", copy)
    assert "replaced by somebody else" in promote(candidate, serving, before)
    assert serving.read_text() == "by hand"
    assert not [*tmp_path.glob("*.unfinished")]


def test_an_export_does_not_lie_beside_another_model(tmp_path, monkeypatch):
    class Exporter:
        def __init__(self, weights):
            self.target = Path(weights).with_suffix(".onnx")

        def export(self, **arguments):
            self.target.write_text("exported")
            return str(self.target)

    monkeypatch.setattr("ultralytics.YOLO", Exporter)
    model = tmp_path / "best.pt"
    attempt = {"model": str(model), "export": "onnx", "training": []}
    for file in (model, tmp_path / "candidate.pt"):
        file.write_text("candidate")
    assert child._export(tmp_path, attempt) == 0
    assert (tmp_path / "best.onnx").read_text() == "exported"
    (tmp_path / "best.onnx").unlink()
    model.write_text("by hand")
    with pytest.raises(ConfigError, match="replaced by somebody else"):
        child._export(tmp_path, attempt)
    assert not (tmp_path / "best.onnx").exists()


def test_a_class_that_could_not_be_written_gets_its_name_at_the_next_try(tmp_path, monkeypatch):
    collection = Collection(tmp_path, ["missing"], 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(moves, "save_text", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            collection.class_ids(["dent"])
    assert collection.class_ids(["dent"]) == [1]
    assert yaml.safe_load(collection.data.read_text())["names"] == {0: "missing", 1: "dent"}


def test_labels_and_caches_that_somebody_has_edited_do_not_stop_the_watch(factory):
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    labels = sorted((factory.work / "dataset" / "labels").rglob("*.txt"))
    texts = " \n", "crack 0.5 0.5 0.1 0.1\n", "7 0.5 0.5 0.1 0.1\n-1 0 0 1 1\n", "1 0\n"
    for label, text in zip(labels, texts, strict=True):
        label.write_text(text)
    cache = factory.work / "dataset" / "labels" / "train.cache"
    cache.touch()
    factory.deliver(4)
    watch = factory.watch(Work())
    assert watch.run() == 0
    assert not cache.exists()  # it may know the labels as they were
    assert watch.collection.objects_by_class(watch.collection.entries.values()) == {"missing": 4, "crack": 1}


def test_a_label_that_is_replaced_while_its_image_is_checked_counts(factory, monkeypatch):
    factory.deliver()
    stock, labels = loop.check_image, iter(["1 0.5 0.5 0.2 0.2"])

    def check(data):
        stock(data)
        for label in labels:
            (factory.inbox / "0.txt").write_text(label)

    monkeypatch.setattr(loop, "check_image", check)
    assert factory.watch(Work()).run() == 0
    (label,) = (factory.work / "dataset" / "labels").rglob("*.txt")
    assert label.read_text() == "1 0.5 0.5 0.2 0.2\n"


def test_images_that_wait_for_a_label_are_not_read_again_and_again(factory, monkeypatch):
    factory.deliver(4)
    for index in range(3):
        (factory.inbox / f"waiting{index}.png").write_bytes(b"an image")
    read = []
    monkeypatch.setattr(moves, "digest", lambda path: read.append(path.name) or "0" * 64)
    watch = factory.watch(Work())
    watch.step()
    watch._is_interrupted = True
    watch.step()
    assert read == []


def test_a_label_that_was_taken_back_takes_no_image_with_it(factory, monkeypatch):
    factory.deliver()
    watch = factory.watch(Work())
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "not yours")))
        watch.step()
    (factory.inbox / "0.txt").unlink()
    assert factory.watch(Work()).run() == 0
    assert (factory.inbox / "0.png").exists()
    (factory.inbox / "0.txt").write_text("1 0.5 0.5 0.1 0.1")
    assert factory.watch(Work()).run() == 0
    (label,) = (factory.work / "dataset" / "labels").rglob("*.txt")
    assert label.read_text().startswith("1 ")


def test_a_look_at_a_large_collection_costs_nothing(factory):
    class Large(dict):
        def __iter__(self):
            raise AssertionError("all images were looked at")

        keys = values = items = __iter__

    factory.deliver(3)
    watch = factory.watch(Work())
    assert watch.step() is Kind.WAIT
    collection = watch.collection
    collection.entries, collection.new = Large(collection.entries), Large(collection.new)
    factory.deliver(2)
    assert watch.step() is Kind.BEGIN


def test_a_check_counts_in_the_middle_of_an_attempt_as_long_as_the_data_set_is_the_same(factory, monkeypatch):
    data, ran = factory.folder / "line.yaml", []
    data.write_text("names: [missing]")
    request = factory.request()
    object.__setattr__(request, "data", str(data))

    def run(words, **_):
        ran.append(words)
        return type("Done", (), {"returncode": 0, "stdout": json.dumps({"names": [data.read_text()]})})

    monkeypatch.setattr(command.subprocess, "run", run)
    for phase, runs in ((Phase.IDLE, 2), (Phase.TRAINING, 2)):
        request.work.mkdir(exist_ok=True)
        state_file.save(request.work / "state.json", State(phase))
        for _ in range(2):
            assert command._check(request) == (0, {"names": ["names: [missing]"]})
        assert len(ran) == runs
    data.write_text("names: [dent, missing]")  # ids in the inbox mean something else now
    assert command._check(request) == (0, {"names": ["names: [dent, missing]"]})
