"""The watch with a training and a comparison that end at once: what it promotes, sets aside, and survives."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.watch.factory import Factory, Work
from yolov12.errors import ConfigError, MissingWeightsError
from yolov12.watch.arguments import check_inbox, parse
from yolov12.watch.phases import Kind, Phase
from yolov12.watch.promotion import promote


def test_a_better_candidate_serves_and_the_one_before_is_kept(factory):
    factory.deliver(5)
    work = Work()
    assert factory.watch(work).run() == 0
    (attempt,) = factory.attempts()
    assert work.started == ["training", "judging", "reporting"]
    assert factory.serving.read_text() == f"candidate of {attempt.name}"
    assert (attempt / "before.pt").read_text() == "first"
    assert json.loads((attempt / "report.json").read_text())["outcome"] == "promoted"
    spec = json.loads((attempt / "attempt.json").read_text())
    assert (spec["number"], spec["images"], spec["objects"]) == (1, 5, {"missing": 5})
    assert factory.watch(Work(), "export=onnx").run() == 0  # nothing is new
    factory.deliver(4)
    again = Work()
    assert factory.watch(again, "export=onnx").run() == 0
    assert again.started == ["training", "judging", "exporting", "reporting"]
    assert (factory.attempts()[1] / "before.pt").read_text() == f"candidate of {attempt.name}"


def test_a_worse_candidate_changes_nothing_and_the_same_images_do_not_begin_another_attempt(factory, capsys):
    factory.deliver(4)
    for _ in range(3):
        work = Work(better=False)
        assert factory.watch(work, "every=1s").run() == 0
        factory.now += 10
    assert "crack fell from 0.500 to 0.400" in capsys.readouterr().out
    assert factory.serving.read_text() == "first"
    assert len(factory.attempts()) == 1
    assert sum(factory.images().values()) == 4
    factory.deliver(4)  # the next attempt trains on all of them, but only these are new
    assert factory.watch(Work()).run() == 0
    spec = json.loads((factory.attempts()[1] / "attempt.json").read_text())
    assert len(spec["new_images"]) == 4
    lists = [(factory.attempts()[1] / f"{split}.txt").read_text().split() for split in ("train", "val")]
    assert sum(map(len, lists)) == 8


def test_work_that_fails_is_repeated_and_then_given_up_with_a_report(factory):
    factory.deliver(4)
    work = Work()
    work.statuses = [1, -9, 0, 1, 0]
    assert factory.watch(work, "restarts=2").run() == 0
    assert work.started == ["training"] * 3 + ["judging"] * 2 + ["reporting"]
    factory.deliver(4)
    work.statuses = [1, 1, 1]
    assert factory.watch(work, "restarts=2").run() == 1
    report = json.loads((factory.attempts()[1] / "report.json").read_text())
    assert report["outcome"] == "failed"
    assert report["detail"] == "the training failed after 3 tries with status 1: it did not work"
    factory.deliver(4)
    work.statuses = [2]
    assert factory.watch(work).run() == 1
    assert len(factory.attempts()) == 3


def test_images_that_arrive_during_an_attempt_are_for_the_next(factory):
    factory.deliver(4)
    work = Work()
    watch = factory.watch(work)
    while watch.state.phase is not Phase.TRAINING:
        watch.step()
    factory.deliver(4)
    work.poll = lambda: None
    for _ in range(3):
        watch.step()
    assert len(watch.collection.entries) == 8
    assert (
        len((watch.attempt / "train.txt").read_text().split()) + len((watch.attempt / "val.txt").read_text().split())
        == 4
    )
    watch.stop()
    assert work.started == ["training", "stop"]
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 2


def test_a_model_that_somebody_replaced_during_an_attempt_is_left_alone(factory, tmp_path):
    factory.deliver(4)
    watch = factory.watch(Work())
    while watch.state.phase is not Phase.JUDGING:
        watch.step()
    factory.serving.write_text("by hand")
    assert watch.run() == 0
    assert factory.serving.read_text() == "by hand"
    assert "replaced by somebody else" in json.loads((watch.attempt / "report.json").read_text())["detail"]


def test_a_promotion_is_one_rename_and_may_be_repeated(tmp_path, monkeypatch):
    candidate, serving, before = (tmp_path / name for name in ("candidate.pt", "best.pt", "before.pt"))
    candidate.write_text("new")
    for file in (serving, before):
        file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            promote(candidate, serving, before)
    assert serving.read_text() == "old"
    with serving.open() as opened:
        for _ in range(2):
            assert promote(candidate, serving, before) == ""
            assert serving.read_text() == "new"
        assert opened.read() == "old"  # whoever has it open reads it to its end
    assert {file.name for file in tmp_path.iterdir()} == {"candidate.pt", "best.pt", "before.pt"}


def test_what_cannot_be_used_is_set_aside_with_its_reason(factory, capsys):
    factory.deliver(2)
    (factory.inbox / "a\x1b[2J b.png").write_bytes(b"no image")
    (factory.inbox / "a\x1b[2J b.txt").write_text("")
    factory.deliver(label="7 0.5 0.5 0.1 0.1")
    for name in ("twin", "triplet"):
        shutil.copy(factory.inbox / "0.png", factory.inbox / f"{name}.png")
        (factory.inbox / f"{name}.txt").write_text("1 0.5 0.5 0.2 0.2")
    assert factory.watch(Work()).run() == 0
    assert [*factory.inbox.iterdir()] == []
    rejected = factory.work / "rejected"
    notes = {file.name.partition("-")[2].partition(".")[0]: file.read_text() for file in rejected.glob("*.reason.txt")}
    assert notes.keys() == {"a_2J_b", "2", "twin", "triplet"}
    assert "cannot be decoded" in notes["a_2J_b"]
    assert "class id 7, which has no name" in notes["2"]
    assert "has the same image" in notes["twin"]
    assert len([*rejected.iterdir()]) == 12  # image, label and reason of each
    assert "\x1b" not in capsys.readouterr().out + "".join(notes.values())
    collected = factory.watch(Work()).collection
    assert [entry["file"] for entry in collected.set_aside_since(0)] != []


class Full:
    """A disk that is full at the write with a number, and from then on until `ends`."""

    def __init__(self, monkeypatch, at):
        self.left, self.is_on = at, True
        for owner, name in ((os, "open"), (Path, "open"), (Path, "replace"), (os, "rename"), (shutil, "copyfile")):
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, stock):
        def write(*args, **kwargs):
            words = [*map(str, args[1:]), *map(str, kwargs.values())]
            writes = stock.__name__ in ("rename", "replace", "copyfile") or any(
                "b" in w and ("w" in w or "x" in w) for w in words
            )
            if writes and self.is_on:
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
            return stock(*args, **kwargs)

        write.__name__ = stock.__name__
        return write


def rename_except_from(folder):
    stock = os.rename

    def rename(source, target):
        if Path(source).parent == folder:
            raise OSError(errno.EXDEV, "another file system")
        stock(source, target)

    return rename


@pytest.mark.parametrize("copies", [False, True], ids=["rename", "copy"])
def test_a_disk_that_is_full_at_any_write_loses_nothing(copies, tmp_path, monkeypatch, capsys, deep):
    writes = int(copies)
    while True:
        folder = tmp_path / str(writes)
        folder.mkdir()
        factory = Factory(folder)
        factory.deliver(4)
        delivered = factory.images()
        with monkeypatch.context() as patch:
            if copies:
                patch.setattr(os, "rename", rename_except_from(factory.inbox))
            full = Full(patch, writes)
            try:
                watch = factory.watch(Work())
            except OSError:
                full.is_on = False
                watch = factory.watch(Work())
            status = watch.run()
            assert all(factory.images()[image] >= 1 for image in delivered)
            if status:
                assert status == 1
                assert capsys.readouterr().out.count("the disk is full") == 1
                assert factory.serving.read_text() in (
                    "first",
                    *(f"candidate of {each.name}" for each in factory.attempts()),
                )
                full.is_on = False
                watch.step()  # the same process goes on when there is room
                assert watch.run() == 0
            elif full.left > 0:
                break
        assert factory.images() == delivered
        assert [*factory.inbox.iterdir()] == []
        assert len(factory.attempts()) == 1
        assert factory.serving.read_text() == f"candidate of {factory.attempts()[0].name}"
        assert not [*factory.folder.rglob("*.unfinished")]
        writes += 1 if deep else 4
    assert writes > 20


def test_a_disk_without_room_for_a_training_begins_none(factory, monkeypatch, capsys):
    factory.deliver(4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    watch = factory.watch(work := Work())
    assert [watch.step() for _ in range(3)] == [Kind.WAIT_FOR_ROOM] * 3
    assert capsys.readouterr().out.count("a training needs 128 MiB") == 1
    assert (work.started, factory.attempts()) == ([], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no data= given"),
        (["data=demo", "inbox=inbox"], "no model= given"),
        (["min_imges=3"], r"unknown argument 'min_imges'\. Did you mean 'min_images'"),
        (["epohcs=3"], r"Did you mean 'epochs'"),
        (["modle=best.pt"], r"Did you mean 'model'"),  # mode= is set by the watch
        (["epochs="], "'epochs=' has no value"),
        (["inbox"], "'inbox' has no value"),
        (["project=x"], "watch sets project= of its trainings itself"),
        (["inbox=missing"], "is not a folder"),
        (["work=inbox/work"], "neither may be inside the other"),
        (["work=."], "neither may be inside the other"),
        (["work=best.pt"], "is not a folder"),
        (["model=inbox"], "does not exist"),
        (["model=best.onnx"], "weights that can be trained"),
        (["every=often"], "every=often: give a time"),
        (["min_images=1"], "at least 2"),
        (["margin=1.5"], "give a fraction"),
        (["export=coreml"], "give one of onnx"),
        (["once=maybe"], "give True or False"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_any_work(words, message, factory, monkeypatch):
    monkeypatch.chdir(factory.folder)
    (factory.folder / "best.onnx").touch()
    whole = ["data=demo", "inbox=inbox", "model=best.pt", *words] if words and "no model" not in message else words
    with pytest.raises((ConfigError, MissingWeightsError), match=message):
        parse(whole)
    assert not factory.work.exists()


def test_arguments_of_the_training_are_passed_on(factory, monkeypatch):
    monkeypatch.chdir(factory.folder)
    request = factory.request("epochs=3", "--mem_limit=2GiB", "every=1.5h", "replay_fraction=0.5", "cos_lr")
    assert request.training == ("epochs=3", "--mem_limit=2GiB", "replay_fraction=0.5", "cos_lr")
    assert request.rules.every_s == 5400
    with pytest.raises(ConfigError, match="neither may be inside"):
        check_inbox(factory.inbox, [str(factory.inbox / "images")])
