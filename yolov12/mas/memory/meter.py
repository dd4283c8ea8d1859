"""Choice of the meter, which reads the memory of a model's device before every step and around every micro-batch.

meter = meter_for(torch.device("cuda:0"), limit=0.5)
allocated_bytes = meter.mark()
...  # forward and backward pass
increment_bytes = meter.peak_bytes() - allocated_bytes
"""

from __future__ import annotations

import torch

from yolov12.errors import ConfigError
from yolov12.mas.memory.cuda import CudaMeter
from yolov12.mas.memory.host import HostMemory, HostMeter
from yolov12.mas.memory.reading import Meter

__all__ = ["meter_for", "shares_memory"]


def meter_for(
    device: torch.device,
    limit: int | float | None = None,
    safety_ratio: float = 0.0,
    memory: HostMemory | None = None,
) -> Meter:
    """Return the meter of a device.

    Args:
        device: A CUDA device or the CPU.
        limit: Memory that this process may use: bytes (int), a fraction of the device (float, above 0 to 1), or None
            for all of it. More than the device has counts as all of it. Inside `Meter.limited`, PyTorch's allocator on
            a GPU keeps to it too. Where the CPU computes or the GPU is integrated, the limit holds for this process and
            its child processes together.
        safety_ratio: Fraction of the memory that the budget leaves free, 0 to 1; see `CudaMeter`.
        memory: Reader of the host's memory.

    Raises:
        ConfigError: The device is neither a CUDA device nor the CPU.
    """
    if device.type == "cuda":
        return CudaMeter(device, limit, memory, safety_ratio=safety_ratio)
    if device.type == "cpu":
        return HostMeter(limit, memory)
    raise ConfigError(f"memory of device '{device}' cannot be read. Train on a GPU (device=0) or on device=cpu")


def shares_memory(device: torch.device) -> bool:
    """Return whether a model on a device shares its memory with all other work of the host.

    Args:
        device: Any device. The CPU and integrated GPUs share the host's memory.
    """
    if device.type == "cuda":
        return bool(torch.cuda.get_device_properties(device).is_integrated)
    return device.type == "cpu"
