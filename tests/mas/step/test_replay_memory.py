"""Memory of replays: room for captures, what gives way to what, and what a result tells the scheduler of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.common.allocations import FailingAllocations
from tests.mas.step.replaying import MIB, AgainRecorder, Meter, Trainer, captured
from yolov12.mas import Config, Engine
from yolov12.mas.step.graphs.recorder import Graphs
from yolov12.mas.step.retry import IN_A_CAPTURE
from yolov12.mas.task import TensorTask


class Unknown:
    """A stopwatch whose time does not become known."""

    def stop(self):
        pass

    def elapsed_ms(self):
        return None


def test_a_result_tells_whether_a_later_batch_will_be_replayed():
    trainer = Trainer()
    first, second, third = (trainer.run((2,), (2,)) for _ in range(3))
    assert [each.waits_for_capture for each in (first, second, third)] == [True, True, False]
    assert [dict(each.usual_ms) for each in (first, second, third)] == [{}, {2: 5.0}, {}]
    assert trainer.step.replays.possible
    slow = captured(slow_replay=True)
    assert not [slow.run((2,), (2,)) for _ in range(3)][-1].waits_for_capture  # it was refused
    assert slow.step.replays.possible


def test_a_result_does_not_wait_for_what_does_not_come():
    trainer = Trainer(limit_bytes=12 * MIB)
    assert not trainer.run((2,), (2,)).waits_for_capture
    assert trainer.step.replays.lacks_room
    other = Trainer()
    other.step._task._may_replay = False
    assert not other.run((2,), (2,)).waits_for_capture
    assert not other.step.replays.possible
    assert not other.step.replays.lacks_room


def test_a_graph_beside_which_the_loss_has_no_room_is_not_captured_again():
    trainer = Trainer(limit_bytes=13 * MIB)
    trainer.recorder.pool_bytes = 6 * MIB  # of each pass
    size = []
    trainer.on_loss = lambda: size.append(trainer.step.replays._size)
    trainer.run((2,), (2,))
    trainer.run((2,))
    size[-1].loss_bytes = 2 * MIB
    for _ in range(3):
        trainer.run((2,), (2,))
        assert (trainer.replayed, trainer.step.replays.lacks_room) == (0, True)
    assert trainer.recorder.recorded == 2
    trainer.limit_bytes = 15 * MIB
    assert trainer.run((2,), (2,)).replayed == 2


def test_the_memory_of_the_loss_is_measured_in_usual_runs():
    """Under a plan that recomputes, the network needs most in its backward pass, which is part of the graph."""
    trainer, sizes = Trainer(limit_bytes=13 * MIB), []
    trainer.recorder.pool_bytes = 4 * MIB  # of each pass; beside them, there is no room for what a usual run needs
    trainer.on_loss = lambda: (trainer.meter.use(3 * MIB), sizes.append(trainer.step.replays._size))
    for _ in range(3):
        trainer.run((2,), (2,))
    assert sizes[0].loss_bytes == 3 * MIB
    assert trainer.replayed == 2
    trainer.needed_bytes = 11.3 * MIB  # the loss may need as much more
    assert trainer.run((2,), (2,)).replayed == 0


def test_graphs_that_have_served_give_way_without_a_pause():
    trainer = captured(limit_bytes=24 * MIB)
    trainer.step.replays.idle_bytes = 10 * MIB
    for _ in range(16):
        trainer.run((2,), (2,))
    trainer.needed_bytes = 15 * MIB
    assert trainer.run((1,), (1,)).replayed == 0
    assert trainer.recorder.released == 1
    trainer.needed_bytes = 10 * MIB
    trainer.run((2,), (2,))
    assert trainer.replayed == 2


def test_graphs_that_have_saved_more_than_captures_take_give_way_without_a_pause():
    """Epochs may be short. Their last batch is smaller, and may have no room beside the graphs."""
    trainer = captured(limit_bytes=24 * MIB)
    for _ in range(3):
        for _ in range(6):
            trainer.run((2,), (2,))
        assert trainer.replayed == 2
        trainer.step.replays.idle_bytes = 10 * MIB
        trainer.needed_bytes = 15 * MIB
        assert trainer.run((1,)).waits_for_capture
        assert not trainer.step.replays.lacks_room
        trainer.needed_bytes = 10 * MIB


def test_a_batch_before_which_graphs_gave_way_does_not_show_how_fast_replays_are():
    trainer = captured(limit_bytes=24 * MIB)
    trainer.step.replays.idle_bytes = 10 * MIB
    trainer.needed_bytes = 15 * MIB
    result = trainer.run((1,), (1,))
    assert (result.replayed, result.waits_for_capture) == (0, True)
    assert not trainer.step.replays.possible


def test_room_that_other_graphs_have_is_not_lacking():
    """The last batch of an epoch may be smaller. Decisions need not leave more room for the graphs of others."""
    trainer = captured(limit_bytes=24 * MIB)
    trainer.step.replays.idle_bytes = 12 * MIB
    result = trainer.run((1,), (1,))
    assert (result.replayed, result.waits_for_capture) == (0, True)
    assert not trainer.step.replays.lacks_room
    both = trainer.run((2,), (1,))
    assert (both.replayed, both.waits_for_capture) == (1, False)  # this batch runs like this


def test_a_lack_of_room_is_told_as_long_as_there_is_one():
    trainer = Trainer(limit_bytes=12 * MIB)
    for _ in range(20):
        trainer.run((2,), (2,))
        assert trainer.step.replays.lacks_room
    trainer.limit_bytes = 2**40
    assert trainer.run((2,), (2,)).replayed == 2


def test_a_capture_that_ran_out_of_memory_lacked_room():
    """So decisions leave more for one, and do not take the size for one that graphs do not make faster."""
    trainer = Trainer(limit_bytes=20 * MIB)
    trainer.recorder.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    for _ in range(20):
        result = trainer.run((2,), (2,))
    assert (result.waits_for_capture, trainer.step.replays.lacks_room) == (False, True)
    assert trainer.notes == [IN_A_CAPTURE]
    trainer.recorder.error = None
    trainer.limit_bytes = 24 * MIB
    assert trainer.run((2,), (2,)).replayed == 0
    trainer.limit_bytes = 25 * MIB
    assert trainer.run((2,), (2,)).replayed == 2


def test_a_size_that_was_replayed_before_is_captured_again_in_the_room_it_had():
    """Others may take memory for a moment; a fixed limit never gives more room than before."""
    trainer = captured(limit_bytes=20 * MIB)
    trainer.step.replays.drop()
    trainer.recorder.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert trainer.run((2,), (2,)).replayed == 0
    trainer.recorder.error = None
    replayed = [trainer.run((2,), (2,)).replayed for _ in range(18)]
    assert replayed == [0] * 15 + [2, 2, 2]
    assert trainer.notes == [IN_A_CAPTURE]
    pauses = []
    for _ in range(3):
        trainer.step.replays.drop()
        trainer.recorder.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
        while len(trainer.notes) < len(pauses) + 2:
            trainer.run((2,), (2,))
        trainer.recorder.error = None
        pauses.append(0)
        while not trainer.run((2,), (2,)).replayed:
            pauses[-1] += 1
    assert pauses == [31, 63, 127]  # a card that is crowded for good is not tried again and again


def test_a_size_that_has_room_and_is_not_captured_is_not_waited_for():
    trainer = Trainer()
    trainer.meter.stopwatch = lambda: Unknown()
    found = [trainer.run((2,), (2,)).waits_for_capture for _ in range(12)]
    assert found == [True] * 8 + [False] * 4


def test_nothing_is_captured_where_memory_does_not_suffice():
    trainer = Trainer(limit_bytes=12 * MIB)
    for _ in range(4):
        trainer.run((2,), (2,))
    assert trainer.recorder.recorded == 0
    trainer.limit_bytes = 13 * MIB
    assert trainer.run((2,), (2,)).replayed == 2


def test_graphs_give_way_to_a_micro_batch_that_does_not_fit_beside_them():
    trainer = Trainer(limit_bytes=24 * MIB)
    trainer.recorder.pool_bytes = 5 * MIB  # of each pass
    for _ in range(3):
        trainer.run((2,), (2,))
    assert trainer.replayed == 2
    assert trainer.step.replays.idle_bytes == 10 * MIB
    trainer.run((2,), (2,))
    size, allocated_bytes, peak_bytes, is_replay = trainer.planner.done_with[-1]
    assert (size, is_replay) == (2, True)
    assert min(allocated_bytes, peak_bytes) >= 10 * MIB
    trainer.run((1,), (1,))  # fits beside them
    assert trainer.replayed == 0
    assert not trainer.planner.done_with[-1][-1]
    trainer.needed_bytes = 15 * MIB
    trainer.run((1,), (1,))
    assert trainer.recorder.released == 1
    assert trainer.step.replays.idle_bytes == 0
    assert trainer.planner.done_with[-1][1] == 0
    trainer.needed_bytes = 10 * MIB
    for _ in range(14):
        assert trainer.run((2,), (2,)).replayed == 0  # for a while
    trainer.run((2,), (2,))
    assert trainer.run((2,), (2,)).replayed == 2


def test_a_replay_that_fails_runs_again_without_graphs():
    trainer = captured()
    left = [1]

    def fail():
        if left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    trainer.on_loss = fail
    trainer.run((2,), (2,))
    assert not trainer.planner.failures  # the same micro-batch fits without graphs
    assert trainer.notes == ["out-of-memory at 2"]
    assert trainer.replayed == 0
    left[0] = 1
    trainer.run((2,), (2,))
    assert [failure.images for failure in trainer.planner.failures] == [2]
    assert len(trainer.notes) == 1


def test_replays_that_lacked_memory_are_captured_again_however_many_they_were():
    trainer = captured()
    left = []

    def fail():
        if left:
            raise left.pop()

    trainer.on_loss = fail
    for _ in range(4):
        left.append(torch.cuda.OutOfMemoryError("CUDA out of memory"))
        assert trainer.run((2,), (2,)).replayed == 0
        trainer.step.replays._pause = 0
        trainer.run((2,), (2,))
        assert trainer.replayed == 2


def test_a_micro_batch_whose_end_could_not_be_timed_counts_once():
    """CUDA makes the event at the end, for which memory may be lacking."""
    trainer, left = captured(), [torch.cuda.OutOfMemoryError("CUDA out of memory")]
    usual = trainer.meter.stopwatch

    def stopwatch():
        watch = usual()
        stop = watch.stop

        def failing():
            stop()
            if trainer.step.replays.is_replay and left:
                raise left.pop()

        watch.stop = failing
        return watch

    trainer.meter.stopwatch = stopwatch
    trainer.run((2,), (2,))
    assert not left
    assert trainer.notes == ["out-of-memory at 2"]


@pytest.mark.parametrize("batches_before", [1, 3], ids=["captured", "replayed"])
def test_any_allocation_beside_graphs_may_fail_and_is_counted(batches_before, deep, monkeypatch):
    monkeypatch.setattr("yolov12.mas.step.graphs.watch._get_current_dispatch_mode", lambda: None)

    def fail(*index):
        trainer = Trainer()
        for _ in range(batches_before):
            trainer.run((2,), (2,))
        mode = FailingAllocations("cpu", like_cuda=True)
        mode.reset(index)
        result = trainer.run((2,), (2,), around=mode)  # compares gradients and statistics
        assert [*trainer.notes, *trainer.planner.failures][1:] == []
        assert bool(trainer.notes or trainer.planner.failures) == bool(index)
        return mode.count, result, trainer.notes

    count, result, _ = fail()
    assert (result.replayed, result.has_captured) == ((1, True) if batches_before == 1 else (2, False))
    found = {tuple(fail(index)[-1]) for index in range(0, count, 1 if deep else 29)}
    assert found <= {(), ("out-of-memory at 2",), ("out-of-memory between micro-batches",), (IN_A_CAPTURE,)}
    assert ((IN_A_CAPTURE,) in found) == (batches_before == 1)


def test_a_warm_up_has_the_memory_of_graphs():
    trainer = captured()
    trainer.step.try_out((torch.randn(2, 3, 4, 4, dtype=torch.float64),), 0, 2)
    assert trainer.recorder.released == 1
    assert trainer.run((2,), (2,)).replayed == 2  # captured again at once


def test_graphs_are_dropped_before_a_validation_unless_they_are_small():
    trainer = captured()
    trainer.step.replays.make_room()
    assert trainer.run((2,), (2,)).replayed == 2
    trainer.step.replays.idle_bytes = 2**40
    trainer.step.replays.make_room()
    assert trainer.recorder.released == 1
    assert trainer.run((2,), (2,)).replayed == 2  # captured again at once


def test_an_engine_leaves_room_for_a_graph_where_that_is_faster(monkeypatch):
    """Four images fit, but no graph of them. Two at once launch as much, and have room for one."""
    meter = Meter(2**40, [0], allocated_bytes=MIB, limit=470 * MIB)
    made = []

    def graphs_for(device, room, wanted):
        made.append(AgainRecorder(meter))
        return Graphs(made[-1], room)

    monkeypatch.setattr("yolov12.mas.engine.graphs_for", graphs_for)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())

    def loss(model, x):
        out, is_replay = model(x), engine._step.replays.is_replay
        meter.use(int((0.05 if is_replay else 1.0) * len(x) * 100 * MIB))
        meter.tick(2.0 * len(x) if is_replay else 50.0)
        return out.square().mean()

    task, config = TensorTask(loss, may_replay=True), replace(Config.parse({"mem_limit": "470MiB"}), bn_group=1)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    with Engine(model, task, config, meter=meter, layers={}) as engine:
        engine._planner.speed.new_size_ms = 0.0
        for _ in range(30):
            found.append(engine.step((torch.randn(8, 3, 5, 5),)))
            engine.update(optimizer)
            engine.flush()
    assert found[-1].replayed == len(found[-1].micro_batches) > 2
    speed = engine._planner.speed
    assert speed.expected_ms(2, 3, 5, 0, replays=True) < 10.0 < 40.0 < speed.expected_ms(2, 3, 5, 0)
    assert all(each.peak_bytes <= each.budget_bytes for each in found)
