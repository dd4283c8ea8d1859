"""Bytes of the optimizer state, by the name of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.mas.profiling.trace import rounded

__all__ = ["OPTIMIZERS", "optimizer_state", "tensors_bytes"]

OPTIMIZERS = {"SGD": 1, "MuSGD": 1, "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 2}
"""Optimizer → number of state tensors per parameter, with Ultralytics' settings. MuSGD keeps one more for 2-D and 4-D
parameters."""


def optimizer_state(model: nn.Module, name: str) -> tuple[str, int]:
    """Resolve the name of an optimizer and compute the size of its state.

    Args:
        model: The model to train.
        name: A value of `optimizer=`. For `auto`, MuSGD is assumed, which Ultralytics chooses for more than 10,000
            steps. For fewer steps it chooses AdamW, whose state has about the same size.

    Returns:
        The name of the optimizer, and the bytes of its state.

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
    """Return the bytes that PyTorch's CUDA allocator needs for tensors, each rounded up to whole blocks."""
    return sum(rounded(tensor.numel() * tensor.element_size()) for tensor in tensors)
