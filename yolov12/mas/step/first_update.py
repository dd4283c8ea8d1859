"""The first update of an optimizer, which creates the optimizer's state and may run out of memory half way.

Later updates find their memory, as the activations of the step have been freed. So only the first update is protected,
by a copy on the host of everything that it changes. This works for any optimizer, however it creates its state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from yolov12.mas.oom import is_out_of_memory
from yolov12.mas.step.retry import Note, Retry, no_note

__all__ = ["Undo", "copy_on_host", "survive_first_update"]

Undo = Callable[[], None]
"""Restores values that were copied."""
_ATTEMPTS = 3


def copy_on_host(tensors: list[Tensor]) -> Undo:
    """Copy tensors to the host.

    Args:
        tensors: Tensors on any device.

    Returns:
        A function that writes the copied values back into the tensors.
    """
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]

    def undo() -> None:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

    return undo


def survive_first_update(
    update: Callable[[], None],
    optimizer: Optimizer,
    release: Callable[[], None],
    remember: Callable[[], Undo],
    note: Note = no_note,
) -> int:
    """Run the first update of an optimizer. After a failed allocation, restore everything, release memory and retry.

    Args:
        update: Steps the optimizer, and does everything else that belongs to an update.
        optimizer: Optimizer without state.
        release: Returns cached memory to the device.
        remember: Called before each attempt. Copies what `update` changes besides parameters, gradients and the state
            of the optimizer, and returns a function that restores it.
        note: Called with an event for each failure before the first attempt.

    Returns:
        Number of failed attempts.

    Raises:
        RuntimeError: The third attempt failed, too, or `update` failed for another reason than memory.
        MemoryError: The third attempt failed, too, for want of host memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    retry = Retry(release, note)
    values = retry(lambda: copy_on_host(parameters))
    gradients = retry(lambda: [(each, each.grad.to("cpu", copy=True)) for each in with_gradient])
    undo: Undo | None = None
    for failures in range(_ATTEMPTS):
        try:
            undo = remember()
            if failures:
                for parameter, gradient in gradients:
                    parameter.grad = gradient.to(parameter.device, copy=True)
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
        if undo is not None:
            undo()
    raise AssertionError  # the last attempt returns or raises
