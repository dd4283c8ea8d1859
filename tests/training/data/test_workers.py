"""The number of loader workers follows what was measured, within cores and memory, and changes no image."""

import itertools
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.cfg import get_cfg

from yolov12.errors import ConfigError
from yolov12.mas.distributed.ranks import ALONE
from yolov12.training.data import workers
from yolov12.training.data.augmentation import Augmentation
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.workers import Pace, PaceClock, Verdict, WorkersControl, judge, more_workers
from yolov12.training.run import setup

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
        batches: Number of batches of an epoch.
    """

    def __init__(self, number, batch_ms, device_ms, batches):
        self.num_workers, self._batch_ms, self._device_ms, self._batches = number, batch_ms, device_ms, batches
        self.restarts, self.is_known = [], True
        self.skipped = self.resets = 0
        self.augmentation = Augmentation()
        self.pace = SimpleNamespace(begin=lambda ahead: None, pace=self._pace)

    def _pace(self, batches):
        assert batches == max(4 * self.num_workers, 1)
        whole_ms = max(self._batch_ms(self.num_workers), self._device_ms)
        return Pace(whole_ms, 1 - self._device_ms / whole_ms) if self.is_known else None

    def __len__(self):
        return self._batches

    def ahead(self, number):
        return 2 * number + 1

    def restart(self, number, ahead):
        self.restarts.append((number, ahead))
        self.num_workers = number


def a_control(
    monkeypatch, batch_ms, device_ms=50, number=8, cores=16, fitting=99, ranks=ALONE, dataset=None, batches=1000, **args
):
    """Return a control, its trainer, its loader and the events that it notes; with several ranks, a function for it."""
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(workers, "chooses_by_place", lambda dataset: dataset != "the user's own")
    monkeypatch.setattr(workers, "room_for_workers", lambda trainer, most, memory, **packed: min(most, fitting))
    given = SimpleNamespace(**{"auto_workers": True, "close_mosaic": 0, "workers": number, **args})
    trainer = SimpleNamespace(args=given, epochs=20, epoch=0, device=GPU, batch_size=64, stop=False)
    loader, events = Loader(number, batch_ms, device_ms, batches), []
    loader.dataset = dataset
    control = partial(WorkersControl, trainer, loader, ranks, events.append)
    return control() if ranks is ALONE else control, trainer, loader, events


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
    assert found == expected[:1] + expected + expected[-1:] * (19 - len(expected))
    assert events == [f"workers {one} to {other}" for one, other in itertools.pairwise(expected)]
    assert trainer.args.workers == expected[-1]


def test_the_log_says_why(monkeypatch, caplog):
    control, trainer, loader, _ = a_control(monkeypatch, slower_beyond_8)
    with caplog.at_level("INFO", logger="ultralytics"):
        numbers(control, trainer, loader)
    assert [record.message for record in caplog.records] == [
        "data: the GPU waited for data 60% of the time: trying 12 workers instead of 8",
        "data: 12 workers instead of 8 were not faster (427 images/s, 512 before): going back",
    ]


def test_the_first_whole_epoch_of_a_process_is_not_compared(monkeypatch):
    """It is slower than others, so any number would seem to be faster."""
    ms = [300]
    control, trainer, loader, _ = a_control(monkeypatch, lambda number: ms[0])
    loader.skipped = 7  # it was begun before an interruption
    control.epoch_ends()
    loader.skipped, ms[:] = 0, [200]
    control.epoch_ends()
    ms[:] = [100]
    assert numbers(control, trainer, loader)[:4] == [8, 12, 8, 8]


@pytest.mark.parametrize(("batches", "last"), [(1000, 7), (30, 5)])
def test_there_is_no_trial_that_could_not_be_judged_before_the_end_or_before_mosaic_is_closed(
    monkeypatch, batches, last
):
    """12 workers are judged after 73 batches, and the first of an epoch does not count."""
    monkeypatch.setattr(workers, "_WORTH_S", 0)
    control, trainer, loader, _ = a_control(monkeypatch, scaling, close_mosaic=10, batches=batches)
    for trainer.epoch in (0, last + 1, 8, 9, 18, 19):
        control.epoch_ends()
        assert loader.num_workers == 8
    trainer.epoch = last
    control.epoch_ends()
    assert loader.num_workers == 12


def test_a_training_that_was_stopped_in_mid_epoch_begins_no_trial(monkeypatch):
    """Ultralytics ends its epoch in the usual way, as when `time` is over."""
    control, trainer, loader, events = a_control(monkeypatch, scaling)
    control.epoch_ends()
    trainer.stop = True
    control.epoch_ends()
    assert (loader.restarts, events) == ([], [])


def test_a_trial_ends_where_mosaic_is_closed(monkeypatch, caplog):
    """Its epochs may become fewer with `time`."""
    control, trainer, loader, _ = a_control(monkeypatch, scaling, close_mosaic=10)
    for trainer.epoch in range(2):
        control.epoch_ends()
    assert (loader.num_workers, trainer.args.workers) == (12, 8)
    loader.resets += 1
    with caplog.at_level("INFO", logger="ultralytics"):
        assert numbers(control, trainer, loader)[1:] == [8] * 19
    assert trainer.args.workers == 8
    assert (
        caplog.messages[-1] == "data: 12 workers instead of 8 cannot be compared, as the data has changed: going back"
    )


@pytest.mark.parametrize(("moves", "expected"), [(1, [8, 8, 8, 10, 10]), (2, [8, 8, 12, 8, 10])])
def test_paces_before_and_after_images_moved_to_the_device_are_not_compared(monkeypatch, moves, expected):
    """`augment_on=auto` moves them at the end of an epoch. On the device 10 workers are enough, on the host 20."""
    work_ms = [1000]
    control, trainer, loader, events = a_control(monkeypatch, lambda number: work_ms[0] / number)
    loader.augmentation = SimpleNamespace(has_moved=False, may_pack=True)
    found, begun = [], []
    loader.pace.begin = begun.append
    for trainer.epoch in range(5):
        found.append(loader.num_workers)
        loader.augmentation.has_moved = trainer.epoch >= moves
        control.epoch_ends()
        if trainer.epoch == moves:
            work_ms[0] = 500
            assert moves == 2 or begun[-1] == loader.ahead(8), "those that are loaded ahead are still of the host"
    assert found == expected
    assert events.count("augmentation to the device") == 1


def test_a_move_to_the_device_is_in_the_journal_also_where_the_number_stays(monkeypatch):
    control, trainer, loader, events = a_control(monkeypatch, scaling, auto_workers=False)
    loader.augmentation = SimpleNamespace(has_moved=True)
    assert numbers(control, trainer, loader) == [8] * 20
    assert events == ["augmentation to the device"]


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


def in_lockstep(ranks, sides):
    """Number of workers of each epoch on each rank."""
    found = {}

    def run(rank):
        ranks.of.rank = rank
        control, trainer, loader, _ = sides[rank]
        found[rank] = numbers(control(), trainer, loader)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(sides))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank][1:5] for rank in range(len(sides))]


def test_ranks_change_together_each_its_own_number(monkeypatch):
    """The second rank does not get faster, so the first would only wait for it instead."""
    ranks = Lockstep(2)
    sides = [a_control(monkeypatch, scaling, 60, number, ranks=ranks) for number in (8, 4)]
    sides[1][2]._batch_ms = lambda number: 125
    assert in_lockstep(ranks, sides) == [[8, 12, 8, 8], [4, 6, 4, 4]]
    assert [[ahead for _, ahead in loader.restarts] for _, _, loader, _ in sides] == [[25, 17]] * 2


def test_a_number_of_other_ranks_is_not_called_one_of_this_rank(monkeypatch, caplog):
    """The first rank has a worker for each core, less one for the training process."""
    ranks = Lockstep(2)
    sides = [a_control(monkeypatch, lambda number: 125, number=number, ranks=ranks) for number in (15, 8)]
    with caplog.at_level("INFO", logger="ultralytics"):
        assert in_lockstep(ranks, sides) == [[15] * 4, [8, 12, 8, 8]]
    assert sorted(set(caplog.messages)) == [
        "data: 12 workers instead of 8 were not faster (512 images/s, 512 before): going back",
        "data: more workers on other ranks were not faster (512 images/s, 512 before): going back",
        "data: the GPU waited for data 60% of the time: trying 12 workers instead of 8",
        "data: the GPU waited for data 60% of the time: trying more workers on other ranks",
    ]
    assert [events for *_, events in sides] == [[], ["workers 8 to 12", "workers 12 to 8"]]


@pytest.mark.parametrize("other", [{"auto_workers": False}, {"dataset": "the user's own"}])
def test_no_rank_chooses_unless_all_do(monkeypatch, other):
    ranks = Lockstep(2)
    sides = [a_control(monkeypatch, scaling, ranks=ranks), a_control(monkeypatch, scaling, ranks=ranks, **other)]
    assert in_lockstep(ranks, sides) == [[8] * 4] * 2


def test_a_trial_that_one_rank_could_not_judge_in_time_does_not_begin(monkeypatch):
    """There are 29 batches, which are enough for 3 workers (19), but not for 12 (73)."""
    ranks, settings = Lockstep(2), {"batches": 30, "close_mosaic": 16}
    monkeypatch.setattr(workers, "_WORTH_S", 0)
    alone, *parts = a_control(monkeypatch, scaling, number=2, **settings)
    assert numbers(alone, *parts[:2])[1:3] == [2, 3]
    sides = [a_control(monkeypatch, scaling, number=number, ranks=ranks, **settings) for number in (2, 8)]
    assert in_lockstep(ranks, sides) == [[2] * 4, [8] * 4]


def a_trainer(given=None, saved=None, device=GPU, **args):
    """Trainer that was just made; `saved` is the choice of the run that it resumes."""
    args = get_cfg(overrides={"workers": (given or {}).get("workers", 8), **args})
    args.auto_workers = saved
    trainer = SimpleNamespace(args=args, device=device, resume=saved is not None)
    workers.made(trainer, given or {})
    return trainer


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
    trainer = a_trainer(given, saved)
    assert trainer.args.auto_workers is expected
    assert trainer.args.workers == given.get("workers", 8)


def test_an_older_run_that_was_given_a_number_keeps_it():
    assert not a_trainer(workers=5).args.auto_workers


@pytest.mark.parametrize(("workers", "expected"), [(0, 8), (2, 8), (12, 12)])
def test_a_run_that_was_begun_on_a_smaller_machine_resumes_with_more_workers(workers, expected):
    assert a_trainer(saved=True, workers=workers).args.workers == expected
    assert a_trainer(saved=False, workers=workers).args.workers == workers
    assert a_trainer(saved=True, workers=workers, device=CPU).args.workers == workers
    assert a_trainer({"workers": workers, "auto_workers": True}, True).args.workers == workers


def test_a_run_that_was_begun_on_the_cpu_may_choose_on_a_gpu():
    """Ultralytics uses no workers on the CPU."""
    assert a_trainer(device=CPU, workers=0).args.auto_workers
    assert not a_trainer(device=CPU, workers=2).args.auto_workers
    assert not a_trainer(device=GPU, workers=0).args.auto_workers


def test_a_trainer_of_the_users_own_may_give_the_number_and_a_bad_switch_is_refused(trainings, tiny_model, tmp_path):
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Own(DetectionTrainer):
        def __init__(self, number, **kwargs):
            super().__init__(**kwargs)
            if number is not None:
                self.args.workers = number

    settings = {**trainings.TINY, "project": tmp_path, "model": tiny_model}
    del settings["recipe"], settings["workers"]
    seen = []
    for number, switch in ((None, {}), (4, {}), (4, {"auto_workers": True})):
        trainer = Own(number, overrides={**settings, **switch})
        setup.train(lambda trainer: seen.append(trainer.args.auto_workers), trainer)
    assert seen == [True, False, True]
    with pytest.raises(ConfigError, match="auto_workers=sometimes: give True or False"):
        Own(None, overrides={**settings, "auto_workers": "sometimes"}).train()


@pytest.mark.parametrize(
    ("machine", "usable", "gpus", "local", "automatic", "expected"),
    [
        (4, 4, 1, 1, True, 4),
        (64, 64, 1, 1, True, 8),
        (128, 16, 8, 1, True, 8),  # `docker run --cpus=16`, so the cores are of this process alone
        (16, 16, 8, 1, True, 2),
        (4, 4, 8, 8, True, 1),
        (16, 16, 1, 4, True, 4),
        (4, 4, 1, 1, False, 8),
    ],
)
def test_it_begins_with_no_more_workers_than_cores(monkeypatch, machine, usable, gpus, local, automatic, expected):
    monkeypatch.setattr("os.cpu_count", lambda: machine)
    monkeypatch.setattr(workers, "usable_cores", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    trainer = SimpleNamespace(args=SimpleNamespace(workers=8, auto_workers=automatic), device=GPU)
    workers.begin(trainer)
    assert trainer.args.workers == expected


class PowerCutError(Exception):
    """Power cut in the middle of an epoch."""


def test_a_training_with_changing_numbers_is_the_same_and_resumes_exactly(trainings, tmp_path, monkeypatch):
    """The number changes after the second and after the third epoch: 1, 2, and back to 1."""
    monkeypatch.setattr(workers, "usable_cores", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for name, value in {"_WAITS": 0.0, "_WORTH_S": 0.0, "_ROUNDS": 0, "_FASTER": 1.0}.items():
        monkeypatch.setattr(workers, name, value)
    monkeypatch.setattr(ResumableLoader, "ahead", lambda loader, workers: 0)
    seen = []

    def have_a_worker(trainer):
        trainer.args.workers = 1  # without a GPU, Ultralytics uses no workers

    def cut_power(trainer):
        if trainer.epoch == 3 and trainer.train_loader.position == 2:
            raise PowerCutError

    begins = ("on_pretrain_routine_start", have_a_worker)
    looks = ("on_train_epoch_start", lambda trainer: seen.append(trainer.train_loader.num_workers))
    settings = {"epochs": 4, "val": False, "bn_group": 8, "micro_batch": 8}
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
    assert seen == [1, 1, 2, 1]
    events = [row["events"] for row in begun.memory if "workers" in row["events"]]
    assert events == ["workers 1 to 2", "workers 2 to 1"]
    resumed = trainings.train(tmp_path, begun.folder / "weights" / "last.pt", callbacks=[begins], resume=True)
    assert resumed.trainer.args.auto_workers is True
    assert resumed.trainer.train_loader.skipped == 2
    assert begun.sums + resumed.sums == plain.sums
    assert all(torch.equal(value, plain.after[name]) for name, value in resumed.after.items())
