"""The number of loader workers follows what was measured, within cores and memory, and changes no image."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.cfg import get_cfg

from yolov12.mas.distributed.ranks import ALONE
from yolov12.training.data import workers
from yolov12.training.data.workers import Pace, PaceClock, Verdict, WorkersControl, is_automatic, judge, more_workers

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_more_workers_are_wanted_after_waits_and_fewer_if_they_were_not_faster():
    assert judge(None, Pace(100, 0.09)) is Verdict.KEEP
    assert judge(None, Pace(100, 0.1)) is Verdict.MORE
    assert judge(Pace(100, 0.5), Pace(98, 0.5)) is Verdict.BACK
    assert judge(Pace(100, 0.5), Pace(98, 0.0)) is Verdict.BACK
    assert judge(Pace(100, 0.5), Pace(90, 0.4)) is Verdict.MORE
    assert judge(Pace(100, 0.5), Pace(60, 0.0)) is Verdict.KEEP


@given(st.integers(1, 64), st.floats(0.1, 1.0), st.integers(0, 128))
def test_a_larger_number_is_within_what_there_is(number, wait, most):
    more = more_workers(number, wait, most)
    assert number <= more <= max(number, most)
    assert more <= number * 1.5 + 1
    assert more > number or most <= number


def test_numbers_that_would_keep_up():
    assert [more_workers(8, wait, 99) for wait in (0.1, 0.2, 0.3, 0.5, 1.0)] == [9, 10, 12, 12, 12]
    assert [more_workers(8, 0.5, most) for most in (0, 8, 11, 15)] == [8, 8, 11, 12]
    assert more_workers(1, 0.2, 99) == 2


class Wait:
    """Stopwatch whose time may not be known yet."""

    def __init__(self, ms):
        self.ms = ms

    def elapsed_ms(self):
        return self.ms


def test_batches_that_may_have_been_loaded_ahead_and_validation_do_not_count():
    clock = PaceClock(itertools.count().__next__)  # a second for each call
    clock.begin(2)
    for number in range(4):
        clock.took(Wait(500.0), is_first=number == 0)
    assert clock.pace(2) == Pace(1000.0, 0.5)
    assert clock.pace(3) is None
    clock.took(Wait(900.0), is_first=True)
    late = Wait(None)  # the device is still at work
    clock.took(late, is_first=False)
    clock.took(Wait(200.0), is_first=False)
    assert clock.pace(2) == Pace(1000.0, 0.5)
    late.ms = 100.0
    clock.took(Wait(200.0), is_first=False)
    assert clock.pace(5) == Pace(1000.0, pytest.approx(0.3))
    clock.begin(0)
    clock.took(Wait(0.0), is_first=False)
    assert clock.pace(0) is None


class Loader:
    """Loader with a number of workers that decides its pace, and the clock that measures it.

    Args:
        number: Number of workers.
        batch_ms: Number of workers → milliseconds of a batch.
        device_ms: Milliseconds of a batch on the device.
    """

    def __init__(self, number, batch_ms, device_ms):
        self.num_workers, self._batch_ms, self._device_ms = number, batch_ms, device_ms
        self.restarts, self.is_known = [], True
        self.pace = SimpleNamespace(begin=lambda ahead: None, pace=self._pace)

    def _pace(self, batches):
        assert batches == max(4 * self.num_workers, 1)
        whole_ms = max(self._batch_ms(self.num_workers), self._device_ms)
        return Pace(whole_ms, 1 - self._device_ms / whole_ms) if self.is_known else None

    def __len__(self):
        return 1000

    def ahead(self, number):
        return 2 * number + 1

    def restart(self, number, ahead):
        self.restarts.append((number, ahead))
        self.num_workers = number


def a_control(monkeypatch, batch_ms, device_ms=50, number=8, cores=16, fitting=99, ranks=ALONE, dataset=None, **args):
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(workers, "chooses_by_place", lambda dataset: dataset != "the user's own")
    monkeypatch.setattr(workers, "room_for_workers", lambda trainer, most, memory: min(most, fitting))
    given = SimpleNamespace(**{"auto_workers": True, "close_mosaic": 0, "workers": number, **args})
    trainer = SimpleNamespace(args=given, epochs=20, epoch=0, device=GPU, batch_size=64)
    loader, events = Loader(number, batch_ms, device_ms), []
    loader.dataset = dataset
    return WorkersControl(trainer, loader, ranks, events.append), trainer, loader, events


def numbers(control, trainer, loader):
    """Number of workers of each epoch."""
    found = []
    for epoch in range(trainer.epochs):
        trainer.epoch = epoch
        found.append(loader.num_workers)
        control.epoch_ends()
    return found


def scaling(number):
    return 1000 / number


def slower_beyond_8(number):
    return 1000 / number if number <= 8 else 150


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_ms": scaling, "device_ms": 80}, [8, 12]),
        ({"batch_ms": scaling, "device_ms": 100}, [8, 10]),
        ({"batch_ms": scaling}, [8, 12, 15]),
        ({"batch_ms": scaling, "cores": 40}, [8, 12, 18, 20]),
        ({"batch_ms": scaling, "cores": 9}, [8]),
        ({"batch_ms": scaling, "fitting": 9}, [8, 9]),
        ({"batch_ms": scaling, "fitting": 3}, [8]),
        ({"batch_ms": slower_beyond_8}, [8, 12, 8]),
        ({"batch_ms": lambda number: 125}, [8, 12, 8]),
        ({"batch_ms": scaling, "device_ms": 120}, [8]),
        ({"batch_ms": scaling, "auto_workers": False}, [8]),
        ({"batch_ms": scaling, "dataset": "the user's own"}, [8]),
        ({"batch_ms": lambda number: 0.1, "device_ms": 0.01}, [8]),  # a few seconds of waiting in the whole run
    ],
)
def test_the_number_grows_while_it_helps_and_then_stays(monkeypatch, settings, expected):
    control, trainer, loader, events = a_control(monkeypatch, **settings)
    found = numbers(control, trainer, loader)
    assert found == expected + expected[-1:] * (20 - len(expected))
    assert events == [f"workers {one} to {other}" for one, other in itertools.pairwise(expected)]
    assert trainer.args.workers == max(found) if expected[-1] != 8 else 8


def test_the_log_says_why(monkeypatch, caplog):
    control, trainer, loader, _ = a_control(monkeypatch, slower_beyond_8)
    with caplog.at_level("INFO", logger="ultralytics"):
        numbers(control, trainer, loader)
    assert [record.message for record in caplog.records] == [
        "data: the GPU waited for data 60% of the time: trying 12 workers instead of 8",
        "data: 12 workers were not faster (427 images/s, 512 before): back to 8",
    ]


def test_a_number_that_cannot_be_judged_before_mosaic_is_closed_is_not_kept(monkeypatch):
    control, trainer, loader, _ = a_control(monkeypatch, scaling, close_mosaic=10, cores=40)
    for trainer.epoch in range(9):
        loader.is_known = trainer.epoch == 4
        control.epoch_ends()
        assert loader.num_workers == (12 if trainer.epoch >= 4 else 8)
        assert trainer.args.workers == 8
    trainer.epoch = 9  # the last one with mosaic
    control.epoch_ends()
    assert loader.num_workers == 8
    control, trainer, loader, _ = a_control(monkeypatch, scaling, close_mosaic=10, cores=40)
    for trainer.epoch in (8, 9, 18, 19):  # no trial that could not be judged
        control.epoch_ends()
        assert loader.num_workers == 8


class Lockstep:
    """Ranks in threads, which call the same methods in the same order."""

    rank = 0

    def __init__(self, size):
        self.size, self._barrier, self._given = size, threading.Barrier(size, timeout=60), [0] * size
        self.of = threading.local()

    def least(self, number):
        self._given[self.of.rank] = number
        self._barrier.wait()
        least = min(self._given)
        self._barrier.wait()
        return least

    def all(self, flag):
        return bool(self.least(int(flag)))


def test_ranks_change_together_each_its_own_number(monkeypatch):
    """The second rank does not get faster, so the first would only wait for it instead."""
    ranks, found, events = Lockstep(2), {}, {}
    sides = [a_control(monkeypatch, scaling, 60, number, ranks=ranks) for number in (8, 4)]
    sides[1][2]._batch_ms = lambda number: 125

    def run(rank):
        ranks.of.rank = rank
        control, trainer, loader, _ = sides[rank]
        found[rank], events[rank] = numbers(control, trainer, loader), loader.restarts

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0][:4] == [8, 12, 8, 8]
    assert found[1][:4] == [4, 6, 4, 4]
    assert [ahead for _, ahead in events[0]] == [ahead for _, ahead in events[1]] == [25, 17]


@pytest.mark.parametrize(
    ("given", "saved", "expected"),
    [
        ({}, None, True),
        ({"workers": 8}, None, False),
        ({"workers": 8, "auto_workers": True}, None, True),
        ({"auto_workers": False}, None, False),
        ({}, False, False),  # a run that resumes
        ({"workers": 4}, True, False),
        ({"workers": 12, "auto_workers": True}, True, True),  # a process for one of several GPUs
    ],
)
def test_a_number_that_the_user_gives_is_taken_as_it_is(given, saved, expected):
    args = get_cfg(overrides={"workers": given.get("workers", 8)})
    args.auto_workers = saved
    assert is_automatic(args, given) is expected


def test_an_older_run_that_was_given_a_number_keeps_it():
    assert not is_automatic(get_cfg(overrides={"workers": 5}), {})


@pytest.mark.parametrize(
    ("cores", "gpus", "local", "automatic", "expected"),
    [(4, 1, 1, True, 4), (64, 1, 1, True, 8), (16, 8, 1, True, 2), (4, 8, 8, True, 1), (16, 1, 4, True, 4),
     (4, 1, 1, False, 8)],
)  # fmt: skip
def test_it_begins_with_no_more_workers_than_cores(monkeypatch, cores, gpus, local, automatic, expected):
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    trainer = SimpleNamespace(args=SimpleNamespace(workers=8, auto_workers=automatic), device=GPU)
    workers.begin(trainer)
    assert trainer.args.workers == expected


class PowerCutError(Exception):
    """Power cut in the middle of an epoch."""


def test_a_training_with_changing_numbers_is_the_same_and_resumes_exactly(trainings, tmp_path, monkeypatch):
    """Every epoch changes the number: 1, 2, and back to 1."""
    monkeypatch.setattr(workers, "usable_cores", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for name, value in {"_WAITS": 0.0, "_WORTH_S": 0.0, "_ROUNDS": 0, "_FASTER": 1.0}.items():
        monkeypatch.setattr(workers, name, value)
    monkeypatch.setattr(PaceClock, "begin", lambda clock, ahead, begin=PaceClock.begin: begin(clock, 0))
    seen = []

    def have_a_worker(trainer):
        trainer.args.workers = 1  # without a GPU, Ultralytics uses no workers

    def cut_power(trainer):
        if trainer.epoch == 2 and trainer.train_loader.position == 2:
            raise PowerCutError

    begins = ("on_pretrain_routine_start", have_a_worker)
    looks = ("on_train_epoch_start", lambda trainer: seen.append(trainer.train_loader.num_workers))
    settings = {"epochs": 3, "val": False, "bn_group": 8, "micro_batch": 8}
    plain = trainings.train(tmp_path, **settings)
    assert plain.trainer.args.auto_workers is False, "workers=0 was given"
    begun = trainings.train(
        tmp_path,
        callbacks=[begins, looks, ("on_train_batch_end", cut_power)],
        raises=PowerCutError,
        auto_workers=True,
        save_every=1,
        **settings,
    )
    assert seen == [1, 2, 1]
    events = [row["events"] for row in begun.memory if "workers" in row["events"]]
    assert events == ["workers 1 to 2", "workers 2 to 1"]
    resumed = trainings.train(tmp_path, begun.folder / "weights" / "last.pt", callbacks=[begins], resume=True)
    assert resumed.trainer.args.auto_workers is True
    assert begun.sums + resumed.sums == plain.sums
    assert all(torch.equal(value, plain.after[name]) for name, value in resumed.after.items())
