"""Snapshots of what a forward pass may change besides gradients and BatchNorm's statistics, which can be restored."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.modules import has_global_hooks, with_own_code

__all__ = ["ModuleState", "PassState", "RandomState", "changing"]

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
        modules: Modules that may change, see `changing`.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [(module, _attributes(module), _copies(module)) for module in modules]

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


class PassState:
    """State of all that a forward pass may change besides gradients and BatchNorm's statistics.

    Args:
        device: Device of the model.
        modules: Modules that may change, see `changing`.
    """

    def __init__(self, device: torch.device, modules: Sequence[nn.Module]) -> None:
        self._states = RandomState(device), ModuleState(modules)

    def restore(self) -> None:
        """Set everything back to this state."""
        for state in self._states:
            state.restore()


def changing(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that a forward pass may change, none for a model of PyTorch's and Ultralytics' usual layers.

    They are the layers of a user's own, those with hooks, and those that keep buffers. As these may also leave
    something in the model itself, it is among them.

    Args:
        modules: Modules of a model, the model first.
    """
    if has_global_hooks():
        return list(modules)
    norms = {kind for kind in set(map(type, modules)) if _is_norm(kind)}
    keeping = [each for each in modules if each._buffers and type(each) not in norms and _buffers(each)]
    found = [*with_own_code(modules), *keeping]
    return list(dict.fromkeys([modules[0], *found])) if found else []


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return each attribute of a module with a copy of its content, for a container."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {
        name: (value, copy.copy(value) if isinstance(value, (list, deque, set, dict)) else None)
        for name, value in own.items()
    }


def _copies(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each of the `_buffers` with a copy."""
    return {name: (buffer, buffer.detach().clone()) for name, buffer in _buffers(module).items()}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a layer; none for PyTorch's BatchNorm."""
    return {name: each for name, each in module._buffers.items() if each is not None and not _is_norm(type(module))}


def _is_norm(kind: type[nn.Module]) -> bool:
    return issubclass(kind, _BatchNorm) and kind.__module__.startswith("torch.")
