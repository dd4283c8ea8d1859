"""The rows and the summary that the engine writes: times, images that are lost, and a disk that is full."""

import errno
from dataclasses import replace

import pytest

from tests.mas.world import IMAGE, World
from yolov12.mas import Engine, records
from yolov12.mas.journal.journal import read_rows
from yolov12.mas.scheduling.peak_model import Level


def test_journal(tmp_path):
    world = World(folder=tmp_path, others=[0, 0, 29, 0], bn_group=4, live=2 * IMAGE)
    for _ in range(3):
        for seed in range(2):  # two batches per update
            world.engine.step(world.data(seed))
        world.engine.update(world.optimizer, epoch=3)
        world.meter.advance()
    summary = world.engine.close(updates_expected=3, is_exact=True)
    rows = read_rows(tmp_path / "memory.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert {(row["epoch"], row["images"], row["image_size"], row["max_boxes"]) for row in rows} == {
        ("3", "32", "64x64", "0")
    }
    assert [row["micro_batches"] for row in rows] == ["16 16", "16 16", "4 4 4 4 4 4 4 4"]
    assert [row["peak_mib"] for row in rows] == ["1800.0", "1800.0", "600.0"]
    assert all(float(row["predicted_mib"]) == pytest.approx(float(row["peak_mib"]), rel=0.03) for row in rows)
    assert [row["budget_mib"] for row in rows] == ["3600.0", "3600.0", "700.0"]
    assert [row["step_ms"] for row in rows] == ["32.0", "32.0", "32.0"]
    assert rows[2]["events"] == "batch of 16 did not fit; shrunk 16 to 4"
    how = "ran as 4 × 4, the same gradient (BatchNorm in groups of 4)"
    assert summary.explanation == f"batch=16 did not fit into the budget of 0.7 GiB in 2 of 6 batches: {how}"
    assert (summary.updates, summary.images, summary.images_lost, summary.shrinks) == (3, 96, 0, 1)


@pytest.mark.parametrize("batches", [0, 1])
def test_images_of_a_batch_that_fails_are_counted_as_lost(tmp_path, batches):
    world = World(folder=tmp_path, bn_group=4)
    world.run(batches)
    world.fail = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        world.step()
    assert world.engine.close().images_lost == 16


def test_images_whose_gradient_reaches_no_update_are_counted_as_lost(tmp_path):
    world = World(folder=tmp_path, bn_group=4)
    world.run(1)
    world.engine.step(world.data(1, 12))
    world.optimizer.zero_grad()
    world.step(2)
    world.engine.step(world.data(3))
    summary = world.engine.close()
    assert (summary.updates, summary.images, summary.images_lost) == (2, 32, 12 + 16)


@pytest.mark.parametrize(("expected", "lost"), [(1, 0), (2, 16), (None, 16)])
def test_images_that_wait_at_the_end_are_lost_if_an_update_of_them_was_expected(tmp_path, expected, lost):
    """Ultralytics makes no update for an accumulation that the end of a training cuts short."""
    world = World(folder=tmp_path, bn_group=4)
    world.run(1)
    world.engine.step(world.data(1))
    assert world.engine.close(updates_expected=expected).images_lost == lost


def test_images_of_the_batch_before_are_not_lost_if_a_batch_cannot_be_read(tmp_path):
    world = World(folder=tmp_path, bn_group=4)
    world.run(1)
    world.engine._task.workload = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        world.step()
    assert world.engine.close().images_lost == 0


@pytest.mark.parametrize("made", [(1.0,), (1.0, 1.01)])
def test_times_under_plans_that_were_replaced_since_teach_nothing(monkeypatch, made):
    """Plans that were guessed are made anew, while times of batches under them are not known yet."""
    world = World()
    world.step()
    records, guessed = world.engine._records, Level(0.4, 1.35)
    add, speed = records.add, records.speed
    speed.set_levels((Level(1.0, 1.0), guessed))
    monkeypatch.setattr(
        records, "add", lambda done: add(replace(done, report=replace(done.report, level=1), level=guessed))
    )
    world.engine.step(world.data())
    speed.set_levels([Level(1.0, slow) for slow in made])
    known = speed.state_dict()
    world.engine.update(world.optimizer)
    assert speed.state_dict() == known


class Behind:
    """Stopwatch of a device that is still at work for the first looks at it."""

    def __init__(self, looks):
        self.looks = looks

    def stop(self):
        pass

    def elapsed_ms(self):
        self.looks -= 1
        return 7.0 if self.looks < 0 else None


@pytest.mark.parametrize("end", [Engine.flush, Engine.close])
@pytest.mark.parametrize(("looks", "step_ms"), [(5, "7.0"), (10**9, "")])
def test_the_last_rows_wait_for_their_times_but_not_for_a_device_that_hangs(tmp_path, monkeypatch, end, looks, step_ms):
    monkeypatch.setattr(records, "_PATIENCE_S", 60.0 if step_ms else 0.01)
    world, watches = World(folder=tmp_path, bn_group=4), []
    world.run(1)
    world.meter.stopwatch = lambda: watches.append(Behind(looks)) or watches[-1]
    world.step()
    world.journal.flush()
    assert [row["step_ms"] for row in read_rows(tmp_path / "memory.csv")] == ["16.0"]  # no update waits
    end(world.engine)
    assert [row["step_ms"] for row in read_rows(tmp_path / "memory.csv")] == ["16.0", step_ms]
    world.journal._file.close()


def test_a_full_disk_while_rows_are_passed_on_does_not_end_a_training(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    world = World(folder=tmp_path, bn_group=4)
    world.run(1)
    monkeypatch.setattr(world.journal, "flush", full)
    world.engine.flush()
    assert world.lines[-1] == (
        "memory: the journal ends here, as it cannot be written: [Errno 28] No space left on device. "
        "The training continues"
    )
    assert world.engine.journal is None
    world.run(1)
    world.engine.flush()
    assert world.engine.close() is None
    world.journal._file.close()
