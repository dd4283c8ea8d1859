"""Bytes that are there whatever the micro-batch: weights, their average, gradients, the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.mas.trace import rounded

__all__ = ["LIBRARY_BYTES", "NOMINAL_BATCH", "OPTIMIZERS", "gradients_bytes", "optimizer_state", "weights_bytes"]

OPTIMIZERS = {"SGD": 1, "MuSGD": 1, "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 2}
"""Tensors of a parameter's size that they keep, as Ultralytics makes them; MuSGD one more for matrices and filters."""

LIBRARY_BYTES = 32 * 2**20
"""cuBLAS' workspace in deterministic mode, which PyTorch takes from its own allocator."""

NOMINAL_BATCH = 64
"""Ultralytics' `nbs`: gradients of smaller batches are added up before the optimizer steps."""


def weights_bytes(model: nn.Module) -> int:
    """Parameters and buffers; the moving average of a training (EMA) is as large."""
    return _bytes((*model.parameters(), *model.buffers()))


def gradients_bytes(model: nn.Module) -> int:
    """One gradient for every parameter that is trained."""
    return _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)


def optimizer_state(model: nn.Module, name: str) -> tuple[str, int]:
    """The optimizer that a name stands for, and the bytes of its state.

    Args:
        model: Has the parameters.
        name: As in `optimizer=`; `auto` counts as in trainings of more than 10,000 steps, where it is MuSGD. In shorter
            ones it is AdamW, which keeps about as much.

    Raises:
        ConfigError: Ultralytics has no such optimizer.
    """
    by_lower = {known.lower(): known for known in OPTIMIZERS} | {"auto": "MuSGD"}
    found = by_lower.get(name.lower())
    if found is None:
        raise ConfigError(f"optimizer={name} is not known. Known are auto, {', '.join(OPTIMIZERS)}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = OPTIMIZERS[found] * _bytes(trained)
    if found == "MuSGD":
        state += _bytes(parameter for parameter in trained if parameter.ndim in (2, 4))
    return found, state


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(rounded(tensor.numel() * tensor.element_size()) for tensor in tensors)
