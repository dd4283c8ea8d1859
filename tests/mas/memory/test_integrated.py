"""The meter of an integrated card, which shares its memory with the host."""

import pytest
import torch

from tests.mas.memory.simulated import GIB, MIB, have_a_worker, limit_group
from yolov12.mas.memory.cuda import CudaMeter
from yolov12.mas.memory.reading import Reading, Sensors

GPU = torch.device("cuda:0")


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
