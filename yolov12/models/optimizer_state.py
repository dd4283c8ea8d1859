"""Bytes of the optimizer's state, by its name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.mas.profiling.trace import rounded

__all__ = ["OPTIMIZERS", "optimizer_state", "tensors_bytes"]

OPTIMIZERS = {"SGD": 1, "MuSGD": 1, "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 2}
"""Tensors of a parameter's size that they keep, as Ultralytics makes them; MuSGD one more for matrices and filters."""


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
    state = OPTIMIZERS[found] * tensors_bytes(trained)
    if found == "MuSGD":
        state += tensors_bytes(parameter for parameter in trained if parameter.ndim in (2, 4))
    return found, state


def tensors_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that PyTorch's allocator gives tensors, each rounded up to its blocks."""
    return sum(rounded(tensor.numel() * tensor.element_size()) for tensor in tensors)
