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
from yolov12.mas.memory.host import HostMeter
from yolov12.mas.memory.reading import Meter

__all__ = ["meter_for"]


def meter_for(device: torch.device, limit: int | float | None = None) -> Meter:
    """Return the meter of a device.

    Args:
        device: A CUDA device or the CPU.
        limit: Memory that this process may use: bytes (int), a fraction of the device (float, above 0 to 1), or None
            for all of it. More than the device has counts as all of it. Inside `Meter.limited`, PyTorch's allocator on
            a GPU keeps to it too.

    Raises:
        ConfigError: The device is neither a CUDA device nor the CPU.
    """
    if device.type == "cuda":
        return CudaMeter(device, limit)
    if device.type == "cpu":
        return HostMeter(limit)
    raise ConfigError(f"memory of device '{device}' cannot be read. Train on a GPU (device=0) or on device=cpu")
