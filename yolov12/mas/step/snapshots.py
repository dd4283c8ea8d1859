"""Snapshots of what a forward pass may change besides gradients and BatchNorm's statistics, which can be restored."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ModuleState", "RandomState"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class RandomState:
    """State of the random generators of Python, NumPy and PyTorch, on the host and on one device.

    Args:
        device: Device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def is_current(self) -> bool:
        """Return whether nothing was drawn since."""
        now = RandomState(self._device)
        return (
            self._python == now._python
            and all(map(np.array_equal, self._numpy, now._numpy))
            and torch.equal(self._torch, now._torch)
            and (self._on_device is now._on_device or torch.equal(self._on_device, now._on_device))  # type: ignore[arg-type]
        )

    def restore(self) -> None:
        """Set the generators back to these states."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002 - Ultralytics and users draw from it
        torch.set_rng_state(self._torch)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)


class ModuleState:
    """State of the modules of a model besides parameters: their attributes, and buffers of all but PyTorch's BatchNorm.

    A layer of a user's own, or a hook on any layer, may count calls, or keep what it saw in a list, set or dictionary.
    PyTorch's InstanceNorm may keep running statistics. Those of BatchNorm are not changed before the end of a batch.

    Args:
        model: Model whose modules may change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _attributes(module), _buffers(module)) for module in model.modules()]

    def restore(self) -> None:
        """Set the modules back to this state."""
        for module, attributes, buffers in self._modules:
            for name in _attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            for name, (value, content) in attributes.items():
                vars(module)[name] = value
                if isinstance(value, (list, deque)):
                    value.clear()
                    value.extend(content)
                elif isinstance(value, (set, dict)):
                    value.clear()
                    value.update(content)
            for name, (buffer, content) in buffers.items():
                module._buffers[name] = buffer
                with torch.no_grad():
                    buffer.copy_(content)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return each attribute of a module with a copy of its content, for a container."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {
        name: (value, copy.copy(value) if isinstance(value, (list, deque, set, dict)) else None)
        for name, value in own.items()
    }


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each buffer of a layer with a copy; none for PyTorch's BatchNorm."""
    if isinstance(module, _BatchNorm) and type(module).__module__.startswith("torch."):
        return {}
    buffers = module._buffers.items()
    return {name: (buffer, buffer.detach().clone()) for name, buffer in buffers if buffer is not None}
