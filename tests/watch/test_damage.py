"""What a power loss, a full disk or a GPU that comes later does to a watch that nobody looks after."""

import errno
import io
import json
import os
import shutil
import sys

import pytest
import torch
import yaml

from tests.watch.factory import Work, go_to, put
from yolov12.errors import DataError, UnreadableWeightsError
from yolov12.watch import child, damage, moves, state_file
from yolov12.watch.phases import Phase, State


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_a_log_that_cannot_be_written_does_not_stop_the_watch(number, factory, monkeypatch):
    class Log(io.StringIO):
        def flush(self):
            raise OSError(number, "cannot be written")

    factory.deliver(4)
    put(factory, "damaged")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Log())
        assert factory.watch(Work()).run() == 0
    assert factory.serving.read_text().startswith("candidate")
    assert len([*(factory.work / "rejected").iterdir()]) == 3


def test_a_log_that_does_not_know_all_letters_does_not_stop_the_watch(factory, monkeypatch):
    put(factory, "日本")
    log = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", log)
        assert factory.watch(Work()).run() == 0
    assert b"\\u65e5\\u672c.png was set aside" in log.buffer.getvalue()


def test_folders_that_somebody_removes_from_a_full_disk_are_made_again(factory):
    watch = factory.watch(Work())
    put(factory, "first")
    factory.deliver()
    watch.step()
    for name in ("rejected", "dataset/received", "history"):
        shutil.rmtree(factory.work / name, ignore_errors=True)
    put(factory, "second", b"another")
    watch._is_interrupted = True  # as after an error
    factory.deliver(3)
    assert watch.run() == 0
    assert [*factory.inbox.iterdir()] == []
    assert len([*(factory.work / "rejected").iterdir()]) == 3
    assert len(factory.attempts()) == 1


@pytest.mark.parametrize("content", [b"", b"\0" * 4096], ids=["empty", "zeros"])
def test_a_state_file_without_content_begins_anew_with_another_number(content, factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    (factory.work / "state.json").write_bytes(content)
    assert factory.watch(Work()).run() == 0
    assert [attempt.name[:4] for attempt in factory.attempts()] == ["0001", "0002"]
    assert factory.serving.read_text() == f"candidate of {factory.attempts()[1].name}"


@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.JUDGING, Phase.PROMOTING])
@pytest.mark.parametrize("name", ["attempt.json", "before.pt", "candidate.pt"])
def test_an_attempt_with_a_file_that_is_gone_or_empty_begins_again(name, phase, factory, capsys):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    (watch.attempt / name).write_bytes(b"")
    run = watch.attempt / "run"
    run.mkdir()
    state_file.save(factory.work / "state.json", State(**{**vars(watch.state), "phase": phase}))
    work = Work()
    assert factory.watch(work).run() == 0
    assert factory.serving.read_text().startswith("candidate")
    assert json.loads((factory.attempts()[0] / "report.json").read_text())["outcome"] == "promoted"
    if phase is not Phase.TRAINING or name != "candidate.pt":
        assert "of attempt 1 is gone" in capsys.readouterr().out
        assert "training" in work.started
        assert not run.exists()  # its weights are of other images


@pytest.mark.parametrize("name", ["data.yaml", "train.txt", "val.txt"])
def test_an_attempt_whose_list_of_images_is_empty_begins_again(name, factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    (watch.attempt / name).write_bytes(b"")
    assert factory.watch(Work()).run() == 0
    assert (watch.attempt / name).read_text()
    assert len(factory.attempts()) == 1


def test_a_candidate_whose_verdict_is_gone_is_not_promoted_without_another(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    (watch.attempt / "verdict.json").write_bytes(b"")
    state_file.save(factory.work / "state.json", State(**{**vars(watch.state), "phase": Phase.PROMOTING}))
    watch = factory.watch(work := Work(better=False))
    assert watch.run() == 0
    assert work.started == ["training", "judging", "reporting"]
    assert factory.serving.read_text() == "first"


@pytest.mark.parametrize("name", ["attempt.json", "verdict.json"])
def test_an_attempt_with_a_file_that_is_cut_off_goes_on(name, factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    whole = (watch.attempt / name).read_text()
    (watch.attempt / name).write_text(whole[: len(whole) // 2])
    assert factory.watch(Work()).run() == 0
    assert json.loads((watch.attempt / "report.json").read_text())["outcome"] == "promoted"
    (watch.attempt / "verdict.json").write_text("[]")
    damage.drop_damaged(watch.attempt / "verdict.json")
    assert not (watch.attempt / "verdict.json").exists()


def test_class_names_that_are_gone_come_from_the_attempts(factory):
    (factory.inbox / "classes.txt").write_text("dent\n")
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    data = factory.work / "dataset" / "data.yaml"
    for break_it in (data.unlink, data.touch):
        break_it()
        if data.exists():
            data.write_bytes(b"")
        assert factory.watch(Work()).collection.names == ["missing", "crack", "dent"]
        assert yaml.safe_load(data.read_text())["names"] == {0: "missing", 1: "crack", 2: "dent"}
    next((factory.work / "dataset" / "labels").rglob("*.txt")).write_text(" \n2 0.5 0.5 0.1 0.1\n")  # by hand
    data.unlink()
    assert len(factory.watch(Work()).collection.names) == 3
    data.unlink()
    shutil.rmtree(factory.work / "history")
    with pytest.raises(DataError, match=r"no attempt in .*history has the name"):
        factory.watch(Work())


def test_lists_that_are_damaged_do_not_stop_the_watch(factory):
    factory.deliver(4)
    put(factory, "damaged")
    assert factory.watch(Work()).run() == 0
    (factory.work / "used.txt").write_bytes(b"\xff\xfe")
    next((factory.work / "rejected").glob("*.reason.txt")).write_bytes(b"x.png: gepr\xfcft")
    (factory.work / "dataset" / "images" / "train" / "\udcffx.png").write_bytes(b"x")
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 2


def test_a_training_whose_gpu_is_away_after_a_restart_is_tried_again(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    (watch.attempt / "run" / "weights").mkdir(parents=True)
    (watch.attempt / "run" / "weights" / "last.pt").touch()
    work = Work()
    work.statuses = [2, 2]
    assert factory.watch(work).run() == 0
    assert work.started == ["training"] * 3 + ["judging", "reporting"]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_training_whose_checkpoint_is_damaged_begins_again(name, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    found = []

    def train(words):
        found.append([file.name for file in run.rglob("*.pt")])
        return 1

    monkeypatch.setattr("yolov12.cli.main", train)
    attempt = {"training": [], "data": "line.yaml"}
    for content in ({"epoch": 0, "optimizer": {}}, None):
        torch.save(content, run / "weights" / name)
        if content is None:
            os.truncate(run / "weights" / name, 100)
        assert child._train(tmp_path, attempt) == 1
    assert found == [[name], []]
    assert "the training begins again" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()], ids=["disk", "memory"])
def test_a_checkpoint_that_cannot_be_read_now_stays(error, tmp_path, monkeypatch):
    last = tmp_path / "run" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    torch.save({"epoch": 3, "optimizer": {}}, last)

    def load(file, refused):
        raise error

    monkeypatch.setattr("yolov12.models.torch_file.load", load)
    monkeypatch.setattr("yolov12.cli.main", lambda words: 1)
    with pytest.raises(UnreadableWeightsError):
        child._train(tmp_path, {"training": [], "data": "line.yaml"})
    assert last.exists()


def test_a_candidate_that_is_no_longer_the_one_that_was_judged_is_not_promoted(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    candidate = watch.attempt / "candidate.pt"
    verdict = {"promote": True, "reasons": [], "classes": [], "candidate": moves.digest(candidate)}
    (watch.attempt / "verdict.json").write_text(json.dumps(verdict))
    candidate.write_text("half of a file")
    state_file.save(factory.work / "state.json", State(**{**vars(watch.state), "phase": Phase.PROMOTING}))
    work = Work()
    assert factory.watch(work).run() == 0
    assert work.started == ["training", "judging", "reporting"]
    assert factory.serving.read_text() == f"candidate of {watch.attempt.name}"


def test_an_empty_serving_model_is_waited_for(factory, capsys):
    factory.deliver(4)
    factory.serving.write_bytes(b"")
    watch = factory.watch(work := Work())
    for _ in range(5):
        watch.step()
    assert watch.run() == 1
    assert work.started == []
    assert capsys.readouterr().out.count("the serving model is empty") == 1
    factory.serving.write_text("first")
    assert watch.run() == 0


def test_files_without_content_and_numbers_of_attempts_are_told(tmp_path):
    assert not damage.has_content(tmp_path / "nothing")
    assert damage.last_number(tmp_path / "history") == 0
    for name in ("0009-x", "0010-y", "notes-z"):
        (tmp_path / "history" / name).mkdir(parents=True)
    assert damage.last_number(tmp_path / "history") == 10


def test_two_files_are_the_same_only_if_their_content_is(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert not moves.same(one, one)
    for content, is_same in (("0 1", True), ("1 1", False), ("0 1 ", False), ("0 1", True)):
        one.write_text("0 1")
        other.write_text(content)
        for file in (one, other):  # a clock with coarse steps
            os.utime(file, (1e9, 1e9))
        assert moves.same(one, other) is is_same
