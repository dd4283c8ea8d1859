"""One batch's way through the engine: plans, failures, and what is said when nothing is left to try."""

import re

import pytest

from yolov12.errors import DoesNotFitError
from yolov12.mas import Advice, Config, Workload
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.oom import Failure
from yolov12.mas.scheduling.peak_model import CostModel, Features, Level
from yolov12.mas.scheduling.planner import WAIT_S, BatchPlanner
from yolov12.mas.scheduling.scheduler import History
from yolov12.mas.scheduling.time_model import SpeedModel

MIB = 2**20
IMAGE = 100 * MIB


AT_ONCE = History(16)
KEEP_ALL = (Level(1.0, 1.0),)


def planner(
    images=16, group=4, room=64, others=(0,), history=AT_ONCE, levels=KEEP_ALL, known=(1, 2, 4, 8, 16), image=IMAGE,
    sleep=lambda seconds: None, ways_out=lambda share: ("amp=True", "imgsz=320", "a smaller model"), models=None,
    boxes=None, live=0, gradients=0, optimizer=0, **config,
):  # fmt: skip
    """A planner on a card of so many images, of which every size up to 16 was seen; or with the models of another."""
    cost, speed = models or (CostModel(levels), SpeedModel(levels))
    for size in known if models is None else ():
        speed.ran(size, 640, 640)
        for _ in range(2):
            cost.observe(Features(size, 640, 640, 5), size * image)
    meter = ReplayMeter(room * IMAGE, others, live, config.get("limit"))
    work = Workload(640, 640, boxes or (5,) * images)
    options = {"gradient_bytes": gradients, "advice": Advice(ways_out, lambda: optimizer), "sleep": sleep}
    one = BatchPlanner(Config(**config), cost, speed, meter, **options)
    one.resume(cost, speed, history)
    one.begin(work, group)
    return one, meter


def failure(images, message="CUDA out of memory. Tried to allocate 20.00 MiB"):
    return Failure(images, message, images * IMAGE)


def ran(plan):
    return [sum(groups) for groups in plan]


def test_plan_is_made_of_whole_groups():
    one, _ = planner(images=18, room=10, safety_ratio=0.0)
    plan = one.plan(0, None)
    assert [size for groups in plan for size in groups] == [4, 4, 4, 4, 2]
    assert max(ran(plan)) <= 8


def test_without_groups_a_micro_batch_is_one():
    one, _ = planner(group=0, room=10, safety_ratio=0.0)
    assert one.plan(0, None) == [(8,), (8,)]


def test_false_alarm_is_retried_unchanged():
    one, _ = planner()
    assert one.plan(0, None) == [(4, 4, 4, 4)]
    assert one.plan(0, failure(16)) == [(4, 4, 4, 4)]
    one.done(0, 16, 0, 16 * IMAGE)
    assert one.events == ["out-of-memory at 16", "retried 16"]
    assert one.history == History(16)
    assert not one.undisturbed


def test_second_failure_halves():
    one, _ = planner()
    one.plan(0, None)
    one.plan(0, failure(16))
    assert ran(one.plan(0, failure(16))) == [8, 8]
    one.done(0, 8, 0, 8 * IMAGE)
    assert one.events == ["out-of-memory at 16", "out-of-memory at 16", "shrunk 16 to 8"]
    assert one.history.images == 8


def test_what_is_done_stays_done():
    one, _ = planner(room=10, safety_ratio=0.0)
    assert ran(one.plan(0, None)) == [8, 8]
    one.done(0, 8, 0, 8 * IMAGE)
    one.plan(8, failure(8))
    assert ran(one.plan(8, failure(8))) == [4, 4]


def test_retry_is_never_larger_than_what_failed():
    """The retry is not larger even if the batch would have grown without the failure."""
    one, _ = planner(history=History(8))
    first = one.plan(0, None)
    assert ran(first) == [8, 8]
    assert one.plan(0, failure(8)) == first


def test_regret_counts_batches_and_not_attempts():
    one, _ = planner(history=History(8))
    one.plan(0, None)
    regret_ms = one.history.regret_ms
    one.plan(0, failure(8))
    assert one.history.regret_ms == regret_ms


def test_memory_that_went_in_between_shrinks_the_retry():
    one, meter = planner(others=[0, 54 * IMAGE], safety_ratio=0.0)
    assert ran(one.plan(0, None)) == [16]
    meter.advance()
    assert ran(one.plan(0, failure(16))) == [8, 8]


def test_groups_are_split_as_the_last_level():
    one, _ = planner(group=8, room=3, safety_ratio=0.0)
    plan = one.plan(0, None)
    assert plan == [(2,)] * 8
    assert "groups of 2" in one.events


@pytest.mark.parametrize(("room", "groups"), [(64, [2, 2, 3]), (2.9, [2, 2, 2, 1]), (1.9, [1] * 7)])
def test_an_image_is_alone_only_where_memory_leaves_no_other_way(room, groups):
    one, _ = planner(images=7, group=2, room=room, safety_ratio=0.0, history=History())
    assert [size for groups in one.plan(0, None) for size in groups] == groups
    assert ("groups of 1" in one.events) is (room == 1.9)


def test_groups_that_memory_holds_again_are_not_split():
    """The batch after one with split groups has whole groups again."""
    one, _ = planner(group=8, history=History(2))
    plan = one.plan(0, None)
    assert {size for groups in plan for size in groups} == {8}
    assert not [event for event in one.events if event.startswith("groups of")]


def test_fixed_size():
    one, _ = planner(images=24, room=2, micro_batch=8)
    assert ran(one.plan(0, None)) == [8, 8, 8]
    assert one.events == []


def test_fixed_size_gives_way_where_it_fails():
    one, _ = planner(micro_batch=8)
    one.plan(0, None)
    one.plan(0, failure(8))
    assert ran(one.plan(0, failure(8))) == [4] * 4


def test_waits_for_other_processes():
    slept = []
    one, meter = planner(
        group=1, room=16, others=[15.9 * IMAGE] * 4 + [0], sleep=lambda s: (slept.append(s), meter.advance())
    )
    assert sum(ran(one.plan(0, None))) == 16
    assert slept == [1.0] * 4
    assert "waited 4 s" in one.events


def test_the_time_of_a_batch_that_waited_is_not_representative():
    one, meter = planner(others=[63.9 * IMAGE, 0], sleep=lambda seconds: meter.advance())
    for waited in (True, False):
        assert ran(one.plan(0, None)) == [16]
        one.done(0, 16, 0, 16 * IMAGE)
        assert one.complete().undisturbed is not waited
        one.begin(Workload(640, 640, (5,) * 16), 4)


def test_a_pass_without_gradients_is_no_replay():
    one, _ = planner()
    one.plan(0, None)
    one.done(0, 16, 0, None, True)
    assert not one.replay_room.peak_bytes
    one.done(0, 16, 0, 16 * IMAGE, True)
    assert one.replay_room.peak_bytes == 16 * IMAGE


def test_gives_up_waiting_and_says_what_to_do():
    slept = []
    one, _ = planner(group=1, room=10, others=[9.5 * IMAGE], safety_ratio=0.0, sleep=slept.append)
    with pytest.raises(DoesNotFitError) as caught:
        one.plan(0, None)
    assert WAIT_S <= len(slept) <= WAIT_S + 1
    text = str(caught.value)
    assert re.match(r"one image needs 10\d MiB at its peak, the budget is 50 MiB \(50 MiB free\)\. Ways out: ", text)
    assert "stop the other processes, which hold 950 MiB" in text
    assert len(text.split("Ways out: ")[1].split("; or ")) == 3


def test_does_not_wait_for_what_nobody_holds():
    slept = []
    one, _ = planner(group=1, room=0.5, sleep=slept.append)
    with pytest.raises(DoesNotFitError, match=r"one image needs 10\d MiB .*Ways out: amp=True; or imgsz=320; or a sma"):
        one.plan(0, None)
    assert slept == []


def test_ways_out_name_the_limit_and_the_safety_share_where_they_are_in_the_way():
    one, _ = planner(group=1, room=1.05, safety_ratio=0.5)
    with pytest.raises(DoesNotFitError, match=r"give a mem_safety_ratio below 0.5"):
        one.plan(0, None)
    one, _ = planner(group=1, room=0.5, limit=50 * MIB)
    with pytest.raises(DoesNotFitError, match=r"give a mem_limit of 118 MiB"):
        one.plan(0, None)


def refused(one, start=0, failed=None):
    """MiB that are needed and those of the limit to give, as the error says."""
    with pytest.raises(DoesNotFitError) as caught:
        one.plan(start, failed)
    found = re.match(r"one image needs ([\d,]+) MiB .* give a mem_limit (?:of|above) ([\d,]+) MiB", str(caught.value))
    return [int(number.replace(",", "")) for number in found.groups()]


@pytest.mark.parametrize("ratio", [0.0, 0.07, 0.1])
def test_the_limit_that_is_named_does(ratio):
    """The limit covers gradients, the image with most boxes, and the state that the optimizer creates."""
    crowded = {"boxes": (5, 5, 300, 5), "group": 1, "known": (1, 2), "gradients": 236 * MIB, "safety_ratio": ratio}
    first = {**crowded, "live": 472 * MIB, "optimizer": 236 * MIB}
    fits = {**crowded, "live": (472 + 236) * MIB}  # as it is from the second batch on
    one, _ = planner(**first, limit=500 * MIB)
    needed, limit = refused(one)
    one, _ = planner(**fits, limit=limit * MIB)
    assert ran(one.plan(0, None)) == [1] * 4
    assert needed * MIB <= one.budget_bytes
    image = 1.05 * IMAGE / MIB / (1 - ratio)  # of which a twentieth is for fuller images
    one, _ = planner(**fits, limit=int(limit - 0.05 * image - 2) * MIB)
    assert refused(one) == [needed, limit]


def test_what_is_needed_is_more_than_the_budget():
    """The need may exceed the budget only because of gradients, which stay allocated once they exist."""
    one, _ = planner(group=1, room=1.5, gradients=IMAGE, safety_ratio=0.0, limit=int(1.5 * IMAGE))
    assert refused(one)[0] > one.budget_bytes / MIB
    one, _ = planner(
        group=1, room=2.5, live=int(1.5 * IMAGE), gradients=IMAGE, safety_ratio=0.0, limit=int(2.5 * IMAGE)
    )
    assert refused(one, 4)[0] == 251


@pytest.mark.parametrize(("images", "limit"), [(1.2, 152), (10, 1001)])
def test_an_image_that_failed_needs_more_than_it_had_got_to(images, limit):
    """After a failed allocation, the further need of the image is unknown, and the present limit is too small."""
    one, _ = planner(images=4, group=1, known=(), history=History(1), limit=int(images * IMAGE), gradients=10 * MIB)
    one.plan(0, None)
    one.plan(0, failure(1))
    with pytest.raises(DoesNotFitError, match=rf"one image needs 130 MiB .* give a mem_limit above {limit:,} MiB"):
        one.plan(0, failure(1))


def test_ways_out_know_the_share_that_would_fit():
    shares = []
    one, _ = planner(group=1, room=0.5, safety_ratio=0.0, ways_out=lambda share: shares.append(share) or ["imgsz=320"])
    with pytest.raises(DoesNotFitError):
        one.plan(0, None)
    assert shares == [pytest.approx(0.5, rel=0.05)]


def test_image_that_fails_alone_twice_ends_it():
    one, _ = planner(images=4, group=1, known=(), history=History(1))
    one.plan(0, None)
    assert ran(one.plan(0, failure(1))) == [1] * 4
    with pytest.raises(DoesNotFitError, match=r"one image needs 12\d MiB"):
        one.plan(0, failure(1))


def test_there_is_a_way_out_even_where_the_caller_names_none():
    one, _ = planner(group=1, room=0.5, ways_out=lambda share: ())
    with pytest.raises(DoesNotFitError) as caught:
        one.plan(0, None)
    assert not str(caught.value).endswith("Ways out: ")


LADDER = (Level(1.0, 1.0), Level(0.8, 1.03), Level(0.5, 1.1), Level(0.4, 1.35))
PEBIBYTE = "CUDA out of memory. Tried to allocate 1048576.00 GiB"


def test_plan_changes_with_the_budget():
    one, _ = planner(levels=LADDER, room=9, safety_ratio=0.0)
    assert ran(one.plan(0, None)) == [16]
    assert one.level == 2
    assert one.events == ["plan 0 to 2"]
    assert one.history == History(16, level=2)


def test_failure_may_be_answered_by_another_plan():
    """Another plan halves the memory at the same size."""
    one, _ = planner(levels=LADDER)
    one.plan(0, None)
    one.plan(0, failure(16))
    assert (ran(one.plan(0, failure(16))), one.level) == ([16], 2)
    assert one.events[-1] == "plan 0 to 2"


@pytest.mark.parametrize("levels", [KEEP_ALL, LADDER])
@pytest.mark.parametrize("images", [1, 16, 256])
def test_number_of_attempts_is_bounded(levels, images):
    """Whatever is tried fails: each second time half of it is next, and one image under the last plan ends it."""
    one, _ = planner(images=images, history=History(images), room=1000, levels=levels)
    attempts = 0

    def try_all():
        nonlocal attempts
        plan = one.plan(0, None)
        while True:
            attempts += 1
            plan = one.plan(0, failure(ran(plan)[0]))

    with pytest.raises(DoesNotFitError):
        try_all()
    assert attempts <= 2 * (images.bit_length() + 3)


def test_injected_failures_do_not_end_a_run():
    """Injected requests exceed every device. Two of them hit every fifth batch, and the size recovers in between."""
    history, sizes, models = AT_ONCE, [], (CostModel(), SpeedModel())
    for size in (1, 2, 4, 8, 16):
        models[0].observe(Features(size, 640, 640, 5), size * IMAGE)
        models[1].ran(size, 640, 640)
    for batch in range(100):
        one, _ = planner(history=history, models=models)
        plan = one.plan(0, None)
        if batch % 5 == 0 and batch < 40:
            for _ in range(2):
                plan = one.plan(0, failure(ran(plan)[0], PEBIBYTE))
        sizes.append(ran(plan)[0])
        start = 0
        for images in ran(plan):
            one.done(start, start + images, 0, images * IMAGE)
            start += images
        history = one.history
    assert sizes[-1] == 16


def test_learns_from_what_ran():
    one, _ = planner(known=(1, 2))
    one.done(0, 8, 5 * MIB, 5 * MIB + 8 * IMAGE)
    assert one.peak_bytes == 5 * MIB + 8 * IMAGE
    assert one.plan(8, None)


def test_tells_whether_a_batch_ran_as_planned():
    one, _ = planner()
    one.plan(0, None)
    assert one.undisturbed
    one.plan(0, failure(16))
    assert not one.undisturbed


def test_time_of_a_move_is_not_that_of_the_size():
    """Memory is given back and asked for again; but the first time of a new size is to be known as such."""
    one, _ = planner(room=10, safety_ratio=0.0)
    assert ran(one.plan(0, None)) == [8, 8]
    assert not one.undisturbed
    stays, _ = planner(room=10, safety_ratio=0.0, history=History(8))
    stays.plan(0, None)
    assert stays.undisturbed
    cost = CostModel()
    cost.observe(Features(16, 640, 640, 5), 16 * IMAGE)
    new, _ = planner(room=10, safety_ratio=0.0, models=(cost, SpeedModel()))
    new.plan(0, None)
    assert new.undisturbed


@pytest.mark.parametrize("micro_batch", [None, 1, 4])
def test_a_wait_ends_though_every_attempt_fails(micro_batch):
    """Memory of other processes would suffice, and a size that seems to fit fails again and again."""
    slept = []
    one, _ = planner(
        images=4, group=1, room=8, others=(7,), known=(1, 2, 4), sleep=slept.append, safety_ratio=0.0,
        micro_batch=micro_batch,
    )  # fmt: skip

    def run(attempts=20 * WAIT_S):
        failed = None
        for _ in range(attempts):
            failed = failure(sum(one.plan(0, failed)[0]))

    with pytest.raises(DoesNotFitError):
        run()
    assert sum(slept) <= WAIT_S


def test_making_a_planner_reads_no_memory_and_lets_no_failure_fade():
    """It is made once for a run; only a batch that begins reads memory, and counts for the failures before it."""
    reads, batches = [], []

    class Meter(ReplayMeter):
        def read(self):
            reads.append(True)
            return super().read()

    class Model(CostModel):
        def new_batch(self):
            batches.append(True)
            super().new_batch()

    meter = Meter(64 * IMAGE, [0])
    one = BatchPlanner(Config(), Model(), SpeedModel(), meter, gradient_bytes=0)
    assert (reads, batches) == ([], [])
    for _ in range(3):
        one.begin(Workload(640, 640, (5,) * 4), 1)
        one.plan(0, None)
        one.complete()
    assert (len(reads), len(batches)) == (3, 3)


def test_a_batch_that_was_not_completed_leaves_no_history():
    one, _ = planner(room=10, safety_ratio=0.0)
    one.plan(0, None)
    assert one.history.images == 8
    one.begin(Workload(640, 640, (5,) * 16), 4)
    assert one.history == AT_ONCE
    one.plan(0, None)
    one.complete()
    one.begin(Workload(640, 640, (5,) * 16), 4)
    assert one.history.images == 8
