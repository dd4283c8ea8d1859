"""What a watch does again by itself: attempts without a result, trainings that get on, and exports."""

import json
import os

import pytest

from tests.watch.factory import Work, go_to
from yolov12.watch import attempts, room
from yolov12.watch.phases import Kind, Outcome, Phase


class Exporting(Work):
    """Its exports fail while `is_away`; else they lie beside the model."""

    is_away = True

    def start(self, task, attempt, log):
        if task == "exporting":
            self.statuses[:0] = [1] if self.is_away else [0]
            if not self.is_away:
                (attempt.parents[2] / "best.onnx").write_text((attempt / "candidate.pt").read_text())
        return super().start(task, attempt, log)


def spec_of(attempt):
    return json.loads((attempt / "attempt.json").read_text())


def run_for(watch, factory, seconds):
    end = factory.now + seconds
    while factory.now < end:
        if watch.step() in (Kind.WAIT, Kind.WAIT_FOR_WORK, Kind.WAIT_FOR_ROOM):
            factory.now += 600


def test_images_of_an_attempt_that_failed_begin_another_one_by_themselves(factory):
    factory.deliver(4)
    watch = factory.watch(work := Work(), "restarts=0")
    work.statuses = [1, 0, 1, 0]  # two trainings, each with its report
    run_for(watch, factory, 3000)
    assert len(factory.attempts()) == 1
    run_for(watch, factory, 3000)
    assert len(factory.attempts()) == 2
    run_for(watch, factory, 10_000)
    first, second, third = factory.attempts()
    assert spec_of(first)["new_images"] == spec_of(second)["new_images"] == spec_of(third)["new_images"]
    assert watch.failed == 2
    assert watch.state.outcome is Outcome.PROMOTED
    run_for(watch, factory, 400 * 86400)
    assert len(factory.attempts()) == 3  # now they are used


def test_a_watch_that_is_started_again_tries_at_once(factory):
    factory.deliver(4)
    work = Work()
    work.statuses = [2]
    assert factory.watch(work).run() == 1
    assert factory.watch(Work()).run() == 0
    assert [json.loads((each / "report.json").read_text())["outcome"] for each in factory.attempts()] == [
        "failed",
        "promoted",
    ]
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 2


def test_a_kill_between_the_list_of_used_images_and_the_state_changes_nothing(factory, monkeypatch):
    factory.deliver(4)
    watch = factory.watch(work := Work(), "restarts=0")
    work.statuses = [1]
    go_to(watch, Phase.REPORTING)
    monkeypatch.setattr(watch, "_go_to", lambda state: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        watch.step()
    assert (factory.work / "used.txt").read_text() == ""
    assert factory.watch(Work()).state.phase is Phase.REPORTING
    assert factory.watch(Work()).run() == 1
    assert len(factory.attempts()) == 1
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 2


def test_images_count_again_if_the_model_was_replaced_during_the_attempt(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    factory.serving.write_text("by hand")
    assert watch.run() == 0
    assert watch.state.outcome is Outcome.NOT_PROMOTED
    assert factory.watch(Work()).run() == 0
    assert factory.serving.read_text().startswith("candidate of 0002")


def test_a_training_that_gets_on_is_not_given_up(factory):
    factory.deliver(4)
    watch = factory.watch(work := Work(), "restarts=1")
    go_to(watch, Phase.TRAINING)
    run = watch.attempt / "run"
    run.mkdir()
    (run / "results.csv").write_text("epoch,time\n")
    for step in range(1, 9):
        (run / "memory.csv").write_text("step,epoch\n" + "".join(f"{each},1\n" for each in range(1, step + 1)))
        assert attempts.progress(watch.attempt) == step
        work.statuses = [-9]
        watch.step()
        watch.step()
        assert (watch.state.phase, watch.state.failures) == (Phase.TRAINING, 1)
        factory.now += 3600
    assert watch.run() == 0


def test_a_failed_export_is_told_and_made_up_for(factory, capsys):
    work = Exporting()
    factory.deliver(4)
    watch = factory.watch(work, "export=onnx", "restarts=0")
    assert watch.run() == 1
    assert factory.serving.read_text() == "candidate of " + factory.attempts()[0].name
    report = json.loads((factory.attempts()[0] / "report.json").read_text())
    assert (report["outcome"], report["detail"]) == ("promoted", "the export failed with status 1: it did not work")
    run_for(watch, factory, 10 * 3600)
    assert 9 <= work.started.count("exporting") <= 11
    factory.deliver(4)
    work.better, before = False, work.started.count("exporting")
    run_for(watch, factory, 1800)  # an attempt that promotes nothing does not forget it
    assert len(factory.attempts()) == 2
    work.is_away = False
    run_for(watch, factory, 7200)
    assert work.started.count("exporting") - before in (1, 2)
    assert (factory.folder / "best.onnx").read_text() == factory.serving.read_text()
    assert "attempt 1: the model that serves is exported" in capsys.readouterr().out
    assert factory.watch(work, "export=onnx").run() == 0
    assert work.started.count("exporting") - before in (1, 2)


@pytest.mark.parametrize("change", ["another model serves", "it is no longer wanted", "the candidate is gone"])
def test_an_export_is_not_made_up_for_if_it_is_not_wanted(change, factory):
    factory.deliver(4)
    work = Exporting()
    assert factory.watch(work, "export=onnx", "restarts=0").run() == 1
    if change == "another model serves":
        factory.serving.write_text("by hand")
    elif change == "the candidate is gone":
        (factory.attempts()[0] / "candidate.pt").unlink()
    words = [] if change == "it is no longer wanted" else ["export=onnx"]
    work.is_away = False
    watch = factory.watch(work, *words)
    assert watch.run() == 0
    assert watch.state.unexported == ""
    assert not (factory.folder / "best.onnx").exists()


def test_new_arguments_count_for_an_attempt_until_its_training_has_saved(factory, capsys):
    factory.deliver(4)
    go_to(factory.watch(Work(), "batch=128"), Phase.TRAINING)
    watch = factory.watch(Work(), "batch=8", "margin=0.5")
    watch.step()
    assert (spec_of(watch.attempt)["training"], spec_of(watch.attempt)["margin"]) == (["batch=8"], 0.5)
    last = watch.attempt / "run" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    later = factory.watch(work := Work(), "batch=4")
    work.statuses = [1]
    go_to(later, Phase.TRAINING)
    factory.now += 60
    assert later.run() == 0
    assert spec_of(later.attempt)["training"] == ["batch=8"]
    told = capsys.readouterr().out
    assert told.count("attempt 1 goes on with the arguments with which it began: batch=8. To begin it again") == 1


def test_a_disk_without_room_for_files_is_told(factory, monkeypatch, capsys):
    stock = os.statvfs
    factory.deliver(4)
    watch = factory.watch(Work())

    def few(path):
        found = list(stock(path))
        found[5:8] = [1000, 10, 10]
        return os.statvfs_result(found)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", few)
        assert watch.run() == 1
    assert "a training needs room for 1000 files (inodes)" in capsys.readouterr().out
    assert factory.watch(Work()).run() == 0


def test_a_full_disk_of_the_model_is_named(factory, monkeypatch):
    models = factory.folder / "models"
    models.mkdir()
    model = models / "best.pt"
    model.write_text("x" * 100)
    (factory.folder / "work").mkdir()
    stock = room.shutil.disk_usage
    monkeypatch.setattr(
        room.shutil, "disk_usage", lambda path: stock(path)._replace(free=199 if path == models else 1 << 40)
    )
    error = room.obstacle((), factory.folder / "work", model)
    assert "a promotion needs 1 MiB" in str(error)
    assert f"Free some space, beside {model}" in room.explained(error, factory.folder / "work", model, 5.0)
