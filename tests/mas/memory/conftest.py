"""Fixtures of the simulated host and the simulated card."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from tests.mas.memory.simulated import GIB, KIB, MIB, Card
from yolov12.mas.memory import nvml
from yolov12.mas.memory.host import HostMemory


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
