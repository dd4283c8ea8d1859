"""The meters of a simulated card, a replayed card, and this machine's GPU."""

import os
from types import SimpleNamespace

import pytest
import torch

from tests.mas.memory.simulated import GIB, MIB
from yolov12.errors import ConfigError
from yolov12.mas.memory import nvml
from yolov12.mas.memory.meter import meter_for
from yolov12.mas.memory.nvml import NvmlGpu, OnceASecond
from yolov12.mas.memory.reading import Reading, Sensors
from yolov12.mas.memory.replay import ReplayMeter

GPU = torch.device("cuda:0")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")


# The budget


def test_budget_is_held_and_free_less_the_safety_share():
    assert Reading(3 * GIB, 2 * GIB, 5 * GIB, 10 * GIB, None).budget_bytes(0.1) == 7 * GIB


def test_limit_counts_as_a_card_of_that_size():
    assert Reading(3 * GIB, 2 * GIB, 60 * GIB, 10 * GIB, None).budget_bytes(0.1) == 9 * GIB


def test_budget_is_never_negative():
    assert Reading(0, 0, GIB, 80 * GIB, None).budget_bytes(0.1) == 0


def test_device_that_no_meter_reads():
    with pytest.raises(ConfigError, match=r"'mps'.*device=cpu"):
        meter_for(torch.device("mps"))


# A simulated card


def test_card_where_nvml_refuses(card):
    meter = meter_for(torch.device("cuda"))
    assert meter.kind == "cuda"
    assert meter.read() == Reading(2 * GIB, GIB, 3 * GIB, 8 * GIB, 3 * GIB)
    assert meter.busy_percent() is None
    assert card.fractions == []


def test_card_peak(card):
    meter = meter_for(GPU)
    assert meter.peak_bytes() == 2 * GIB
    assert meter.mark() == GIB
    assert meter.peak_bytes() == GIB


@pytest.mark.parametrize(("limit", "total"), [(2 * GIB, 2 * GIB), (0.25, 2 * GIB), (1.0, 8 * GIB), (99 * GIB, 8 * GIB)])
def test_limit_on_a_card_stops_the_allocator_too(card, limit, total):
    meter = meter_for(GPU, limit)
    assert meter.read() == Reading(2 * GIB, GIB, 3 * GIB, total, 3 * GIB)
    assert card.fractions == []  # reading changes nothing
    with meter.limited():
        assert card.fractions == [(total / (8 * GIB), 0)]
    assert card.fractions[1:] == [(1.0, 0)]


def test_a_limit_on_a_card_gives_back_the_one_around_it(card):
    """A prediction in a callback of a training is such a case. Without its own limit, it keeps that of the training."""
    training, prediction, unlimited = (meter_for(GPU, limit) for limit in (0.5, 0.25, None))
    with training.limited():
        with prediction.limited():
            pass
        with unlimited.limited():
            pass
        assert card.fractions == [(0.5, 0), (0.25, 0), (0.5, 0)]
    assert card.fractions[3:] == [(1.0, 0)]


def test_limits_on_a_card_may_end_in_any_order(card):
    """A prediction that is streamed may outlive a training that began before it."""
    training, prediction = (meter_for(GPU, limit).limited() for limit in (0.5, 0.25))
    training.__enter__()
    prediction.__enter__()
    training.__exit__(None, None, None)
    assert card.fractions[-1] == (0.25, 0)
    prediction.__exit__(None, None, None)
    assert card.fractions[-1] == (1.0, 0)


def test_a_limit_that_the_user_has_set_is_found_and_restored(card, monkeypatch):
    """PyTorch tells it from 2.8 on."""
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.7, raising=False)
    with meter_for(GPU, 0.5).limited():
        pass
    assert card.fractions == [(0.5, 0), (0.7, 0)]


def test_a_card_is_held_to_some_bytes_for_a_while(card, monkeypatch):
    """The limit that is in force must be known, as it is from PyTorch 2.8 on, or under a limit of this package."""
    meter = meter_for(GPU)
    assert meter.held_to(GIB) is None
    limited = meter_for(GPU, 0.5)
    with limited.limited():
        for most_bytes, fraction in ((GIB, 1 / 8), (6 * GIB, 0.5)):
            with meter.held_to(most_bytes):
                assert card.fractions[-1] == (fraction, 0)
            assert card.fractions[-1] == (0.5, 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.7, raising=False)
    with meter.held_to(7 * GIB):
        assert card.fractions[-1] == (0.7, 0)
    assert card.fractions[-1] == (0.7, 0)
    # What cudaMallocAsync tells without a limit cannot be set.
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 2.3e8, raising=False)
    with meter.held_to(4 * GIB):
        assert card.fractions[-1] == (0.5, 0)
    assert card.fractions[-1] == (1.0, 0)
    card.integrated = 1
    assert meter_for(GPU).held_to(GIB) is None
    assert meter_for(torch.device("cpu")).held_to(GIB) is None


def test_own_context_is_not_others(card):
    own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=2 * GIB + 300 * MIB)
    card.nvml["nvmlDeviceGetComputeRunningProcesses"] = [own, SimpleNamespace(pid=2**30, usedGpuMemory=None)]
    meter = meter_for(GPU)
    assert meter.read().others_bytes == 3 * GIB - 300 * MIB
    card.free -= GIB  # another process allocates memory
    assert meter.read().others_bytes == 4 * GIB - 300 * MIB


def test_process_numbers_of_another_namespace_tell_nothing(card):
    card.nvml["nvmlDeviceGetComputeRunningProcesses"] = [SimpleNamespace(pid=2**30, usedGpuMemory=2 * GIB)]
    assert meter_for(GPU).read().others_bytes == 3 * GIB


def test_busy_percent(card):
    card.nvml["nvmlDeviceGetUtilizationRates"] = SimpleNamespace(gpu=93, memory=10)
    assert meter_for(GPU).busy_percent() == 93.0


def test_question_is_asked_once_a_second():
    now_s, answers = [5.0], iter("ab")
    question = OnceASecond(lambda: next(answers), lambda: now_s[0])
    assert question() == "a"
    now_s[0] = 5.9
    assert question() == "a"
    now_s[0] = 6.0
    assert question() == "b"


def test_no_nvml_module(monkeypatch):
    monkeypatch.setattr(nvml, "pynvml", None)
    with nvml.nvml_session():
        assert nvml.ask("nvmlDeviceGetCount") is None


def test_power_and_temperature_of_a_card(card):
    assert meter_for(GPU).sensors() == Sensors()
    card.nvml = {"nvmlDeviceGetPowerUsage": 61_500, "nvmlDeviceGetTemperature": 55}
    assert meter_for(GPU).sensors() == Sensors(61.5, 55.0)


def test_stopwatch_waits_for_nothing(card, monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            self.stream = None

        def record(self, stream):
            self.stream = stream

        def query(self):
            return done

        def elapsed_time(self, end):
            assert (self.stream, end.stream) == ("stream 0", "stream 0")
            return 7.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream {device}")
    done = True
    stopwatch = meter_for(GPU).stopwatch()
    assert stopwatch.elapsed_ms() is None
    stopwatch.stop()
    done = False
    assert stopwatch.elapsed_ms() is None
    done = True
    assert stopwatch.elapsed_ms() == 7.5


# A replayed card


def test_replay_of_an_invented_trace():
    meter = ReplayMeter(10 * GIB, [0, 6 * GIB], allocated_bytes=GIB)
    assert meter.read() == Reading(GIB, GIB, 9 * GIB, 10 * GIB, 0)
    meter.use(9 * GIB)
    assert meter.peak_bytes() == 10 * GIB
    assert meter.mark() == meter.peak_bytes() == GIB
    for _ in range(2):  # the last value stays
        meter.advance()
        assert meter.read().budget_bytes(0.1) == 3 * GIB
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"^CUDA out of memory"):
            meter.use(3 * GIB + 1)
    assert meter.peak_bytes() == GIB
    meter.use(3 * GIB)
    assert meter.peak_bytes() == 4 * GIB


def test_replay_with_a_limit():
    meter = ReplayMeter(10 * GIB, [GIB], allocated_bytes=GIB, limit=0.4)
    assert meter.read().budget_bytes(0.25) == 3 * GIB
    meter.use(3 * GIB)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        meter.use(3 * GIB + 1)


def test_replayed_clock():
    meter = ReplayMeter(GIB, [0])
    stopwatch = meter.stopwatch()
    meter.tick(12.5)
    assert stopwatch.elapsed_ms() is None
    stopwatch.stop()
    meter.tick(1)
    assert stopwatch.elapsed_ms() == 12.5


# This machine's GPU


@pytest.mark.gpu
@needs_gpu
def test_peak_on_a_gpu_is_what_was_allocated():
    meter = meter_for(GPU)
    meter.release()
    allocated_bytes, stopwatch = meter.mark(), meter.stopwatch()
    block = torch.ones(64 * MIB + 1, dtype=torch.uint8, device=GPU)
    assert meter.read().allocated_bytes == meter.peak_bytes()
    del block
    # The allocator rounds up to 512 bytes and may give up to 1 MiB more with a block.
    assert 64 * MIB < meter.peak_bytes() - allocated_bytes <= 65 * MIB + 512
    assert meter.mark() == meter.peak_bytes() == allocated_bytes
    stopwatch.stop()
    torch.cuda.synchronize()
    assert stopwatch.elapsed_ms() > 0
    assert NvmlGpu(0).matched_by == "UUID"
    assert 0 <= meter.busy_percent() <= 100


@pytest.mark.gpu
@needs_gpu
def test_limit_on_a_gpu_is_kept():
    whole = meter_for(GPU)
    whole.release()
    limited = meter_for(GPU, whole.read().reserved_bytes + 64 * MIB)
    with limited.limited():
        assert limited.read().budget_bytes(0) == limited.read().total_bytes
        torch.empty(48 * MIB, dtype=torch.uint8, device=GPU)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(80 * MIB, dtype=torch.uint8, device=GPU)
    torch.empty(80 * MIB, dtype=torch.uint8, device=GPU)
