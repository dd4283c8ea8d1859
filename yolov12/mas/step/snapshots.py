"""Snapshots of what a forward pass may change besides gradients and BatchNorm's statistics, which can be restored."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.modules import has_global_hooks, with_own_code

__all__ = ["ModuleState", "PassState", "RandomState", "changing"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_CONTAINERS = (list, deque, set, dict)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
    """State of modules besides parameters and the running statistics of PyTorch's BatchNorm: attributes and buffers.

    A layer of a user's own, or a hook on any layer, may count calls, or keep what it saw in a list, set or dictionary.
    PyTorch's InstanceNorm may keep running statistics. Those of BatchNorm are not changed before the end of a batch.
    What is inside of a container's elements, and tensors that are attributes, are not copied.

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
                if name in module._modules or name in module._parameters:  # it was assigned since, and stays
                    continue
                vars(module)[name] = value() if isinstance(value, ReferenceType) else value
                _fill(value, content)
            for name in _buffers(module).keys() - buffers.keys():
                del module._buffers[name]
                module._non_persistent_buffers_set.discard(name)
            for name, (buffer, content) in buffers.items():
                module._buffers[name] = buffer if buffer is None or content is None else _written(buffer, content)


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

    They are the layers of a user's own, those with hooks, the layers in both, and those that keep buffers. As these may
    also leave something in the model itself, it is among them.

    Args:
        modules: Modules of a model, the model first.
    """
    if has_global_hooks():
        return list(modules)
    norms = {kind for kind in set(map(type, modules)) if _is_norm(kind)}
    own = [part for each in with_own_code(modules) for part in each.modules()]
    found = [*own, *(each for each in modules if each._buffers and type(each) not in norms)]
    return list(dict.fromkeys([modules[0], *found])) if found else []


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return each attribute of a module with a copy of its content, for a container.

    A feature map that a layer keeps is not kept alive by this: nobody looks at it before the next pass.
    """
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {
        name: (ref(value), None)
        if isinstance(value, Tensor) and value.grad_fn is not None
        else (value, copy.copy(value) if isinstance(value, _CONTAINERS) else None)
        for name, value in own.items()
    }


def _fill(value: Any, content: Any) -> None:
    """Give a container its content again. One that has it is left alone: another thread may be reading it."""
    if isinstance(value, _CONTAINERS) and _ids(value) != _ids(content):
        value.clear()
        (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def _ids(container: list[Any] | deque[Any] | set[Any] | dict[Any, Any]) -> list[int]:
    if isinstance(container, set):
        return sorted(map(id, container))
    return list(map(id, chain(container, container.values()) if isinstance(container, dict) else container))


def _written(buffer: Tensor, content: Tensor) -> Tensor:
    """Return a buffer with a content: the same tensor, unless it was resized or cannot be written."""
    if buffer.shape != content.shape or buffer.is_inference() or 0 in buffer.stride():
        return content.clone()
    with torch.no_grad():
        return buffer.copy_(content)


def _copies(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return each of the `_buffers` with a copy."""
    found = _buffers(module).items()
    return {name: (buffer, None if buffer is None else buffer.detach().clone()) for name, buffer in found}


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of a layer, without the running statistics of PyTorch's BatchNorm."""
    apart = _STATISTICS if _is_norm(type(module)) else ()
    return {name: buffer for name, buffer in module._buffers.items() if name not in apart}


def _is_norm(kind: type[nn.Module]) -> bool:
    return issubclass(kind, _BatchNorm) and kind.__module__.startswith("torch.")
