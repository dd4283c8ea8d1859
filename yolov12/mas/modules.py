"""Helpers for modules and their inputs.

They are a temporary forward pass, looks whether modules were replaced, have hooks or code of the user's own, and a map
over tensors in nested containers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import is_
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["LIBRARIES", "Structure", "each_tensor", "forward_of", "has_global_hooks", "has_hooks", "module_of"]
__all__ += ["overridden", "with_own_code"]

LIBRARIES = ("torch.", "torchvision.", "ultralytics.", "yolov12.")
"""How the names of modules begin whose code is no user's, see `module_of`."""

_CODE = (FunctionType, property, classmethod, staticmethod)
_PLAIN = frozenset((str, int, float, bool, type(None)))
"""Most frequent types in batches; `each_tensor` returns them unchanged at once."""


@contextmanager
def overridden(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward passes of modules inside the context, then restore them.

    Args:
        forwards: Module → function that is called in place of its `forward`.
    """
    # Written to `__dict__` directly, because Module.__setattr__ is slow and has nothing to do here.
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            if module in own:
                module.__dict__["forward"] = own[module]
            else:
                module.__dict__.pop("forward", None)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that run in its forward or backward pass."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Return whether there are hooks that run in the forward or backward pass of all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def module_of(value: Any) -> str:
    """Return the module of the code of a function, a method, a class, or an object's class.

    A function of the user's may bear the name and the module of the one that it replaces, as with `functools.wraps`.
    Code that was run by `exec` may have no module: its name is empty then.
    """
    names = getattr(getattr(value, "__func__", value), "__globals__", None)
    if names is not None:
        return str(names.get("__name__") or "")
    return str(getattr(value, "__module__", None) or type(value).__module__)


def forward_of(module: nn.Module) -> Any:
    """Return the forward pass of a module, without what the engine does around it, see `overridden`."""
    forward = module.forward
    while isinstance(forward, partial) and module_of(forward.func).startswith("yolov12."):
        forward = forward.args[-1]
    return forward


def with_own_code(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules with hooks, and those with a forward pass or a method of the user's own.

    Args:
        modules: Modules to look at, between batches or in them.
    """
    own = {kind for kind in set(map(type, modules)) if not _is_of_a_library(kind)}
    return [each for each in modules if type(each) in own or has_hooks(each) or _has_own_forward(each)]


def _is_of_a_library(kind: type[nn.Module]) -> bool:
    """Return whether a class computes as one of a library does: it has no function of its own but `__init__`."""
    own = (vars(each) for each in kind.__mro__[:-1] if not each.__module__.startswith((*LIBRARIES, "abc", "typing")))
    is_like = all(name == "__init__" or not isinstance(value, _CODE) for each in own for name, value in each.items())
    return is_like and module_of(getattr(kind, "forward", None)).startswith(LIBRARIES)


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) and not module_of(forward_of(module)).startswith(LIBRARIES)


class Structure:
    """Modules and parameters of a model: notices when one of them is replaced.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._take_note()

    def changed(self) -> bool:
        """Return whether a module or a parameter was replaced since the last call."""
        if len(self._kept) == sum(map(len, self._parts)) and all(map(is_, self._kept, self._now())):
            return False
        self._take_note()
        return True

    def _take_note(self) -> None:
        modules = list(self._model.modules())
        self._parts: list[dict[str, Any]] = [module._modules for module in modules]
        self._parts += [module._parameters for module in modules]
        self._kept = list(self._now())

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._parts))


def each_tensor(nest: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Return a copy of nested tuples, lists and dictionaries in which all tensors are replaced.

    Args:
        nest: A tensor or a container. Other objects are returned unchanged.
        change: Is called with each leaf of the kind; its result replaces the leaf.
        kind: Type of the leaves to replace.
    """
    if isinstance(nest, kind):
        return change(nest)
    if type(nest) in _PLAIN:
        return nest
    if type(nest) in (list, tuple):
        return type(nest)([each_tensor(value, change, kind) for value in nest])
    if isinstance(nest, Mapping):
        return {key: each_tensor(value, change, kind) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(each_tensor(value, change, kind) for value in nest))
    return nest
