"""What a captured graph has built in of a model, and whether all of it is known.

A graph repeats kernels. It does not run Python again, so it would miss a hook, a layer that counts its calls, or an
attribute that was changed since. Networks are therefore captured only if all their code is PyTorch's, Ultralytics' or
this package's, and graphs are dropped as soon as anything of the model is not what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from operator import is_
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from yolov12.mas.modules import has_global_hooks, has_hooks

__all__ = ["ModelWatch", "settings"]

_KNOWN = ("torch", "ultralytics", "yolov12")
"""Packages whose layers compute the same whenever they are given the same."""


class ModelWatch:
    """Watches a model between batches.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._parts: list[Mapping[str, Any]] = []
        self._kept: list[Any] = []
        self._addresses: list[int] = []
        self._is_known = False

    def changed(self) -> bool:
        """Return whether anything was replaced, set or moved since the last call; True for the first.

        Looks at modules, their attributes, buffers, parameters and classes.
        """
        now = list(self._now())
        if now and len(now) == len(self._kept) and all(map(is_, now, self._kept)) and self._now_at() == self._addresses:
            return False
        self._modules = list(self._model.modules())
        self._parts = [
            part for each in self._modules for part in (vars(each), each._buffers, each._parameters, each._modules)
        ]
        self._parts += [vars(kind) for kind in {kind for module in self._modules for kind in type(module).__mro__}]
        self._kept, self._addresses = list(self._now()), self._now_at()
        self._is_known = all(map(_is_known, self._modules))
        return True

    def why_not(self) -> str:
        """Return why the network must not be captured now; empty if it may be. Call `changed` before.

        Users may attach hooks at any time.
        """
        if not self._is_known:
            return "a layer or a method is not known"
        if has_global_hooks() or any(map(has_hooks, self._modules)):
            return "a module has a hook"
        if any(each._backward_hooks or each._post_accumulate_grad_hooks for each in self._parameters()):
            return "a parameter has a hook"
        if torch.is_anomaly_enabled() or _get_current_dispatch_mode() is not None:
            return "something observes each operation"
        return ""

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(part.values() for part in self._parts)

    def _now_at(self) -> list[int]:
        """Return the addresses of the parameters, negative for those that are frozen."""
        return [each.data_ptr() if each.requires_grad else -each.data_ptr() for each in self._parameters()]

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (each for module in self._modules for each in module._parameters.values() if each is not None)


def settings() -> tuple[Any, ...]:
    """Return the settings of PyTorch that decide which kernels a network runs."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        torch.is_autocast_enabled(),
        _autocast_type(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        _tf32(cudnn),
        _tf32(matmul),
        matmul.allow_fp16_reduced_precision_reduction,
    )


def _tf32(backend: Any) -> Any:
    """Return whether a library may use TF32."""
    if hasattr(backend, "fp32_precision"):  # from PyTorch 2.9 on, which warns of the other
        return backend.fp32_precision
    return backend.allow_tf32


def _autocast_type() -> torch.dtype:
    if hasattr(torch, "get_autocast_dtype"):  # from PyTorch 2.4 on, which warns of the other
        found: torch.dtype = torch.get_autocast_dtype("cuda")
        return found
    return torch.get_autocast_gpu_dtype()


def _is_known(module: nn.Module) -> bool:
    """Return whether a module runs known code only: no class, and no method of class or module, is the user's."""
    own = (value for value in vars(module).values() if isinstance(value, (FunctionType, MethodType, partial)))
    kinds = [kind for kind in type(module).__mro__ if kind is not object]
    return (
        not any(own)
        and all(_root(kind.__module__) in (*_KNOWN, "abc", "typing") for kind in kinds)
        and all(_root(function.__globals__["__name__"]) in _KNOWN for kind in kinds for function in _functions(kind))
    )


def _functions(kind: type) -> Iterator[FunctionType]:
    for value in vars(kind).values():
        function: Callable[..., Any] | None = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, FunctionType):
            yield function


def _root(name: str) -> str:
    return name.partition(".")[0]
