"""The first optimizer step, which makes the optimizer's state and may run out of memory half way through it.

Later steps find their memory: it is what the activations of the step before have left. So only the first is protected,
by a copy on the host of all it changes; any optimizer will do, however it makes its state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from yolov12.mas.oom import is_out_of_memory

__all__ = ["Undo", "copy_on_host", "survive_first_update"]

Undo = Callable[[], None]
_ATTEMPTS = 3


def copy_on_host(tensors: list[Tensor]) -> Undo:
    """Copy tensors to the host; returns what puts the values back."""
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]

    def undo() -> None:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

    return undo


def survive_first_update(
    update: Callable[[], None], optimizer: Optimizer, release: Callable[[], None], remember: Callable[[], Undo]
) -> int:
    """Run the first update of an optimizer; where memory fails, put everything back, free memory and run it again.

    Args:
        update: Steps the optimizer, and whatever goes with that.
        optimizer: Has no state yet.
        release: Gives cached memory back to the device.
        remember: Called before each attempt for what `update` changes besides parameters, gradients and the optimizer.

    Returns:
        Number of failures.

    Raises:
        RuntimeError: The third failure.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = copy_on_host(parameters)
    gradients = [
        (parameter, parameter.grad.to("cpu", copy=True)) for parameter in parameters if parameter.grad is not None
    ]
    for failures in range(_ATTEMPTS):
        undo = remember()
        try:
            update()
            return failures
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or failures == _ATTEMPTS - 1:
                raise
        optimizer.state.clear()
        for parameter in parameters:
            parameter.grad = None
        release()
        values()
        for parameter, gradient in gradients:
            parameter.grad = gradient.to(parameter.device, copy=True)
        undo()
    raise AssertionError  # the last attempt returns or raises
