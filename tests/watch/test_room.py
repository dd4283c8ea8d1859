"""Weights of attempts that are over: which of them make room for a training on a full disk, and which stay."""

import shutil

from tests.watch.factory import Work, go_to
from yolov12.watch.phases import Outcome, Phase


def test_weights_of_a_training_that_is_over_do_not_fill_the_disk(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.REPORTING)
    weights = watch.attempt / "run" / "weights"
    weights.mkdir(parents=True)
    (weights.parent / "results.csv").touch()
    assert watch.run() == 0
    assert not weights.exists()
    assert (weights.parent / "results.csv").exists()
    assert (watch.attempt / "candidate.pt").exists()


def test_weights_of_a_training_that_failed_stay(factory):
    factory.deliver(4)
    watch = factory.watch(work := Work())
    go_to(watch, Phase.TRAINING)
    work.statuses = [1] * 6
    last = watch.attempt / "run" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert watch.run() == 1
    assert watch.state.outcome is Outcome.FAILED
    assert last.exists()  # there is no other copy of days of work


def test_weights_of_old_attempts_make_room_for_a_training(factory, monkeypatch, capsys):
    for _ in range(12):
        factory.deliver(4)
        factory.watch(Work()).run()
    assert len([*factory.work.rglob("*.pt")]) == 24

    def usage(path):  # two attempts too many
        return shutil._ntuple_diskusage(1 << 40, 0, 200 << 20 if len([*factory.work.rglob("*.pt")]) <= 20 else 0)

    factory.deliver(4)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert factory.watch(Work()).run() == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 0))
    factory.deliver(4)
    assert factory.watch(Work()).run() == 1  # the last ten stay
    kept = [attempt.name[:4] for attempt in factory.attempts() if [*attempt.glob("*.pt")]]
    assert kept == [f"{number:04d}" for number in range(4, 14)]
    assert all((attempt / "report.json").exists() for attempt in factory.attempts())
    assert capsys.readouterr().out.count("were deleted, because the disk is almost full") == 3


def test_weights_that_serve_or_are_of_others_make_no_room(factory, monkeypatch):
    for _ in range(12):
        factory.deliver(4)
        factory.watch(Work()).run()
    first, second, *_ = factory.attempts()
    (first / "run" / "weights").mkdir(parents=True)
    (first / "run" / "weights" / "best.pt").touch()  # of a training that failed
    elsewhere = factory.folder / "archive"
    elsewhere.mkdir()
    (factory.work / "history" / "0001-archive").symlink_to(elsewhere)
    mine = [elsewhere / "old.pt", factory.work / "history" / "00-kept", factory.work / "history" / "best-ones" / "a.pt"]
    mine[2].parent.mkdir()
    for file in mine:
        file.write_text("mine")
    (first / "linked.pt").symlink_to(mine[0])
    factory.serving.unlink()
    factory.serving.symlink_to(second / "before.pt")  # back to an earlier one
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 0))
    factory.deliver(4)
    assert factory.watch(Work()).run() == 1
    assert [file.name for file in first.rglob("*.pt")] == ["linked.pt"]
    assert [file.name for file in second.rglob("*.pt")] == ["before.pt"]
    assert factory.serving.exists()
    assert all(file.exists() for file in mine)
