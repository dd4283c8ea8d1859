"""The meters: for this machine's memory, a simulated card, a replayed card, and this machine's GPU."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from yolov12.errors import ConfigError
from yolov12.mas.memory import host as host_memory
from yolov12.mas.memory import nvml
from yolov12.mas.memory.cuda import CudaMeter
from yolov12.mas.memory.host import HostMemory, HostMeter
from yolov12.mas.memory.meter import meter_for
from yolov12.mas.memory.nvml import NvmlGpu, OnceASecond
from yolov12.mas.memory.reading import Reading, Sensors
from yolov12.mas.memory.replay import ReplayMeter

KIB, MIB, GIB = 2**10, 2**20, 2**30
GPU = torch.device("cuda:0")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")


# The budget


def test_budget_is_held_and_free_less_the_safety_share():
    assert Reading(3 * GIB, 2 * GIB, 5 * GIB, 10 * GIB, None).budget_bytes(0.1) == 7 * GIB


def test_limit_counts_as_a_card_of_that_size():
    assert Reading(3 * GIB, 2 * GIB, 60 * GIB, 10 * GIB, None).budget_bytes(0.1) == 9 * GIB


def test_budget_is_never_negative():
    assert Reading(0, 0, GIB, 80 * GIB, None).budget_bytes(0.1) == 0


# The host of this machine. Linux counts resident pages per processor and adds them up in steps, hence the 8 MiB.


@pytest.fixture
def collected():
    """Let no garbage of earlier tests be freed while memory is measured."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@needs_linux
def test_host_peak_rises_by_what_was_allocated_and_falls_after_a_mark(collected):
    meter = meter_for(torch.device("cpu"))
    allocated_bytes = meter.mark()
    block = torch.ones(200 * MIB, dtype=torch.uint8)
    assert meter.read().reserved_bytes >= allocated_bytes + 192 * MIB
    del block
    assert 192 * MIB <= meter.peak_bytes() - allocated_bytes <= 208 * MIB
    allocated_bytes = meter.mark()
    assert meter.peak_bytes() - allocated_bytes <= 8 * MIB
    torch.ones(50 * MIB, dtype=torch.uint8)  # freed at once
    assert 42 * MIB <= meter.peak_bytes() - allocated_bytes <= 58 * MIB


@needs_linux
@pytest.mark.skipif(not host_memory.trim_heap(), reason="the C library cannot give its heap back")
def test_small_host_step_is_measured_after_a_large_one(collected):
    meter = HostMeter()
    allocated_bytes = meter.mark()
    blocks = [torch.ones(64 * KIB, dtype=torch.uint8) for _ in range(3200)]
    assert meter.peak_bytes() - allocated_bytes >= 150 * MIB  # 200, less what is resident at the edges of holes
    last = blocks.pop()  # at the end of the heap: the freed memory below it stays resident
    del blocks
    allocated_bytes = meter.mark()
    blocks = [torch.ones(64 * KIB, dtype=torch.uint8) for _ in range(800)]
    assert 42 * MIB <= meter.peak_bytes() - allocated_bytes <= 66 * MIB
    del last, blocks


def test_host_of_this_machine():
    meter = meter_for(torch.device("cpu"))
    reading = meter.read()
    assert 0 < reading.allocated_bytes <= reading.reserved_bytes < reading.total_bytes
    assert 0 < reading.free_bytes < reading.total_bytes
    assert meter_for(torch.device("cpu"), 0.5).read().total_bytes == reading.total_bytes // 2
    assert meter_for(torch.device("cpu"), GIB).read().total_bytes == GIB
    assert meter.busy_percent() is None
    stopwatch = meter.stopwatch()
    assert stopwatch.elapsed_ms() is None
    stopwatch.stop()
    assert stopwatch.elapsed_ms() >= 0


def test_device_that_no_meter_reads():
    with pytest.raises(ConfigError, match=r"'mps'.*device=cpu"):
        meter_for(torch.device("mps"))


# A simulated host


@pytest.fixture
def invented(tmp_path):
    """Return a simulated host of 8 GiB and a function that sets this process' resident size and its peak, in MiB."""
    memory = HostMemory(tmp_path / "proc", tmp_path / "cgroup")
    (memory.proc / "self").mkdir(parents=True)
    (memory.proc / "self/clear_refs").mkdir()  # a folder, so the reset is not permitted
    (memory.proc / "meminfo").write_text(f"MemTotal: {8 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {6 * MIB} kB\n")

    def hold(now_mib, peak_mib):
        text = f"Name:\tpython 3\nVmHWM:\t{peak_mib * KIB} kB\nVmRSS:\t{now_mib * KIB} kB\n"
        (memory.proc / "self/status").write_text(text)

    hold(1024, 1024)
    return memory, hold


def limit_group(folder, limit_bytes, used_bytes, cache_bytes, names=("memory.max", "memory.current", "inactive_file")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit_bytes}\n")
    (folder / names[1]).write_text(f"{used_bytes}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache_bytes}\n")


def test_host_without_a_control_group(invented):
    memory, _ = invented
    assert HostMeter(memory=memory).read() == Reading(GIB, GIB, 6 * GIB, 8 * GIB, GIB)


def test_host_in_nested_control_groups(invented):
    memory, _ = invented
    (memory.proc / "self/cgroup").write_text("0::/job/step\n")
    limit_group(memory.cgroups / "job", 4 * GIB, 3 * GIB, GIB // 2)
    limit_group(memory.cgroups / "job/step", "max", 3 * GIB, 0)
    assert HostMeter(memory=memory).read() == Reading(GIB, GIB, 3 * GIB // 2, 4 * GIB, 3 * GIB // 2)
    limited = HostMeter(2 * GIB, memory).read()
    assert (limited.total_bytes, limited.others_bytes) == (2 * GIB, 3 * GIB // 2)


def test_host_in_a_control_group_of_version_1(invented):
    memory, _ = invented
    (memory.proc / "self/cgroup").write_text("3:cpu:/x\n4:memory:/not/there\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_group(memory.cgroups / "memory", 4 * GIB, 3 * GIB, GIB // 2, names)
    assert HostMeter(memory=memory).read() == Reading(GIB, GIB, 3 * GIB // 2, 4 * GIB, 3 * GIB // 2)


def test_host_whose_peak_cannot_be_reset_and_heap_not_be_given_back(invented, monkeypatch):
    memory, hold = invented
    monkeypatch.setattr(host_memory, "trim_heap", lambda: False)
    meter = HostMeter(memory=memory)
    assert meter.mark() == GIB
    hold(1500, 3000)
    assert meter.peak_bytes() == 3000 * MIB
    assert meter.mark() == GIB  # the other 476 MiB may be in the C library's heap
    hold(1800, 3000)  # the peak is that of the previous step
    assert meter.peak_bytes() == 1800 * MIB
    hold(900, 3200)
    assert meter.peak_bytes() == 3200 * MIB
    assert meter.read().allocated_bytes == 900 * MIB
    assert meter.mark() == 900 * MIB


@pytest.fixture
def trims(monkeypatch):
    """Return a list that gets an entry whenever the heap is returned to the system."""
    found = []
    monkeypatch.setattr(host_memory, "trim_heap", lambda: found.append(None) or True)
    return found


def test_equal_steps_on_the_host_keep_their_pages(invented, trims):
    memory, hold = invented
    meter, at = HostMeter(memory=memory), []
    for mark in range(1, 201):
        before = len(trims)
        hold(1024 + mark % 3, 3000)
        meter.mark()
        hold(1030, 3000)
        meter.peak_bytes()
        meter.release(thorough=False)  # as after each validation
        at += [mark] * (len(trims) - before)
        meter.read()
    assert at == [1, 2, 4, 8, 16, 32, 64, 128, 192]


@pytest.mark.parametrize(("limit", "trimmed"), [(None, 0), (3 * GIB, 1)])
def test_what_a_validation_leaves_in_the_heap_does_not_count_as_a_step_where_memory_is_short(
    limit, trimmed, invented, trims
):
    memory, hold = invented
    meter = HostMeter(limit, memory)
    for _ in range(2):
        meter.mark()
        hold(1200, 1200)
        meter.peak_bytes()
    hold(2000, 2000)  # the validation
    meter.read()
    before = len(trims)
    meter.mark()
    assert len(trims) - before == trimmed


def test_a_host_without_proc_is_one_clear_error(tmp_path):
    for read in (HostMemory.resident_bytes, HostMemory.room_bytes):
        with pytest.raises(ConfigError, match=r"memory cannot be read, as .* is missing: use Linux"):
            read(HostMemory(tmp_path, tmp_path))


# A simulated card


class Card:
    """Replacement for torch.cuda with 8 GiB: 3 free, 2 reserved by this process, and 1 of those allocated."""

    def __init__(self):
        self.integrated, self.fractions, self.nvml = 0, [], {}
        self.live, self.peak, self.held, self.free = GIB, 2 * GIB, 2 * GIB, 3 * GIB

    def counters(self, device):
        assert device == 0
        allocated = {"current": self.live, "peak": self.peak, "allocated": 9, "freed": 9}
        return {"allocated_bytes": {"all": allocated}, "reserved_bytes": {"all": {"current": self.held}}}

    def reset(self, device):
        self.peak = self.live

    def ask(self, question, *arguments):
        if question not in self.nvml:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return self.nvml[question]


@pytest.fixture
def card(monkeypatch):
    card = Card()
    for name, value in (
        ("current_device", lambda: 0),
        ("get_device_properties", lambda device: SimpleNamespace(is_integrated=card.integrated)),
        ("mem_get_info", lambda device: (card.free, 8 * GIB)),
        ("memory_stats_as_nested_dict", card.counters),
        ("reset_peak_memory_stats", card.reset),
        ("set_per_process_memory_fraction", lambda fraction, device: card.fractions.append((fraction, device))),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction", raising=False)  # as before PyTorch 2.8
    monkeypatch.setattr(nvml, "same_gpu", lambda index, driver: ("handle", "UUID"))
    for name in [name for name in dir(pynvml) if name.startswith(("nvmlDeviceGet", "nvmlInit"))]:
        monkeypatch.setattr(pynvml, name, lambda *arguments, name=name: card.ask(name, *arguments))
    return card


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


def test_integrated_card_has_what_the_host_has_available(card, invented):
    card.integrated, (memory, _) = 1, invented
    (memory.proc / "meminfo").write_text(f"MemTotal: {7 * MIB} kB\nMemAvailable: {4 * MIB} kB\n")
    meter = CudaMeter(GPU, host=memory)
    assert meter.kind == "integrated"
    # 1 GiB is the host memory of this process.
    assert meter.read() == Reading(2 * GIB, GIB, 4 * GIB, 7 * GIB, others_bytes=0, outside_bytes=GIB)
    assert CudaMeter(GPU, 0.5, memory).read().total_bytes == 7 * GIB // 2
    with CudaMeter(GPU, 0.5, memory).limited():
        assert card.fractions == [(2.5 / 8, 0)]


@pytest.fixture
def pool(card, invented):
    """An integrated GPU: 8 GiB for CPU and GPU, of which 5 are available, and 1 GiB of this process on the host."""
    card.integrated, (memory, _) = 1, invented
    (memory.proc / "meminfo").write_text(f"MemTotal: {8 * MIB} kB\nMemAvailable: {5 * MIB} kB\n")
    return memory


def have_a_worker(memory, mib):
    """Let process 11 be a child of this process, with so much memory."""
    for name, text in {
        "self/stat": "10 (python) S 1",
        "11/stat": "11 (python) S 10",
        "11/statm": f"1 {mib * MIB // os.sysconf('SC_PAGE_SIZE')} 1",
        "11/smaps_rollup": f"Pss: {mib * KIB} kB\nPrivate_Dirty: {mib * KIB} kB\n",
    }.items():
        (memory.proc / name).parent.mkdir(exist_ok=True)
        (memory.proc / name).write_text(text)


def test_the_limit_of_an_integrated_card_is_for_all_that_the_run_has(card, pool):
    have_a_worker(pool, 512)
    reading = CudaMeter(GPU, 4 * GIB, pool).read()
    assert (reading.total_bytes, reading.outside_bytes, reading.others_bytes) == (4 * GIB, 3 * GIB // 2, 0)
    assert reading.budget_bytes(0.1) == int(2.5 * GIB - 0.4 * GIB)
    assert CudaMeter(GPU, None, pool).read().budget_bytes(0) == 6.5 * GIB  # all but the worker and the host's part
    card.integrated = 0
    assert CudaMeter(GPU, 4 * GIB, pool).read().budget_bytes(0) == 4 * GIB  # a card with memory of its own


@pytest.mark.parametrize("cuda_is_charged", [True, False])
def test_the_control_group_of_an_integrated_card_is_its_pool(card, pool, cuda_is_charged):
    """1 GiB of this process on the host counts as usage of the group, and on some systems the 2 GiB of the card too."""
    (pool.proc / "self/cgroup").write_text("0::/job\n")
    limit_group(pool.cgroups / "job", 4 * GIB, (3 if cuda_is_charged else 1) * GIB + GIB // 2, cache_bytes=GIB // 2)
    assert CudaMeter(GPU, None, pool).read().budget_bytes(0) == 3 * GIB


def test_an_integrated_card_refuses_what_would_let_the_kernel_kill(card, pool):
    """Half of the margin stays free, whatever is allocated. The limit follows the readings, and is restored."""
    meter = CudaMeter(GPU, None, pool, safety_ratio=0.25)
    with meter.limited():
        assert card.fractions == [((7 - 1) / 8, 0)]  # 7 GiB are within reach, and half of the margin is 1 GiB
        (pool.proc / "meminfo").write_text(f"MemTotal: {8 * MIB} kB\nMemAvailable: {2 * MIB} kB\n")  # a neighbour
        meter.read()
        assert card.fractions[1:] == [(3 / 8, 0)]
        (pool.proc / "meminfo").write_text(f"MemTotal: {8 * MIB} kB\nMemAvailable: 0 kB\n")
        card.held = 0
        meter.read()
        assert card.fractions[2:] == [(0.0, 0)]
    assert card.fractions[3:] == [(1.0, 0)]
    meter.read()
    assert len(card.fractions) == 4


def test_a_reading_does_not_lift_the_limit_of_a_context_that_opened_later(card, pool):
    training, prediction = (CudaMeter(GPU, limit, pool) for limit in (None, 2 * GIB))
    with training.limited():
        with prediction.limited():
            assert card.fractions[1:] == [((2 - 1) / 8, 0)]
            card.free = 0
            training.read()
            assert len(card.fractions) == 2
        assert card.fractions[2:] == [(7 / 8, 0)]


def test_an_integrated_card_without_nvml_has_tegras_sensors(card, pool, tmp_path):
    lay = {"devices/gpu.0/load": 500, "class/thermal/thermal_zone0/type": "gpu-thermal"}
    for name, text in {**lay, "class/thermal/thermal_zone0/temp": 45_000}.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(str(text))
    meter = CudaMeter(GPU, None, pool, sys=tmp_path / "sys")
    assert (meter.busy_percent(), meter.sensors()) == (50.0, Sensors(None, 45.0))
    bare = CudaMeter(GPU, None, pool, sys=tmp_path / "none")
    assert (bare.busy_percent(), bare.sensors()) == (None, Sensors())


def test_power_and_temperature_of_a_card(card):
    assert meter_for(GPU).sensors() == Sensors()
    card.nvml = {"nvmlDeviceGetPowerUsage": 61_500, "nvmlDeviceGetTemperature": 55}
    assert meter_for(GPU).sensors() == Sensors(61.5, 55.0)


def test_workers_of_a_host_training_count_in_its_limit(invented):
    memory, _ = invented
    have_a_worker(memory, 512)
    reading = HostMeter(4 * GIB, memory).read()
    assert (reading.reserved_bytes, reading.outside_bytes) == (GIB, GIB // 2)
    assert reading.budget_bytes(0.1) == int(3.5 * GIB - 0.4 * GIB)
    assert reading.others_bytes == GIB // 2  # what the machine does not have available, and this run does not hold
    assert HostMeter(memory=memory).read().budget_bytes(0) == 7 * GIB  # what is available is less by the worker already


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
