"""The allow-list for checkpoints: classes that may be instantiated, and functions that check their arguments.

The list is based on `ultralytics.nn.tasks._SafeLoad` (8.4.190) and on checkpoints of many kinds and ages. An untrusted
file can run every entry.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn

from yolov12.models.limits import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_TEXT, volume

_LAYER_PACKAGES = (
    *("torch.nn.modules", "ultralytics.nn.modules", "ultralytics.nn.tasks"),
    *("torchvision.ops", "torchvision.models", "torchvision.transforms"),
)
"""Packages whose `nn.Module` classes may be instantiated."""

_LOSS_MODULES = (
    *("ultralytics.utils.loss", "ultralytics.utils.tal", "ultralytics.nn.distill_model"),
    *("ultralytics.models.utils.loss", "ultralytics.models.utils.ops"),  # of RT-DETR
)
"""Modules whose own classes may all be instantiated: a checkpoint from the middle of a training holds its loss."""

_TRANSFORMS = "torchvision.transforms.transforms"
_PLAIN_CLASSES = (
    *(f"{_TRANSFORMS}.Compose", f"{_TRANSFORMS}.ToTensor", "ultralytics.utils.IterableSimpleNamespace"),
    # Classifiers of Ultralytics 8.0 hold these.
    *(f"ultralytics.data.augment.{name}" for name in ("ClassifyLetterBox", "CenterCrop", "ToTensor")),
)

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
"""Class name of a storage → type of its elements. Quantised tensors are not read."""

RENAMED = {
    "ultralytics.nn.modules.block.Silence": "torch.nn.modules.linear.Identity",  # in YOLOv9e
    "ultralytics.nn.tasks.YOLOv10DetectionModel": "ultralytics.nn.tasks.DetectionModel",
    "ultralytics.utils.loss.v10DetectLoss": "ultralytics.utils.loss.E2EDetectLoss",
}
"""Class name of an older Ultralytics → class that replaces it."""


class RefusedCall(Exception):  # noqa: N818
    """An allowed function was called with arguments that are not allowed."""


class Token:
    """Stands for a name in the file: a function that checks its arguments, a class, or a type of storage.

    A name that is refused stands for nothing.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any] | None = None,
        cls: type | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.call, self.cls, self.dtype = name, call, cls, dtype

    @property
    def refused(self) -> bool:
        """True if the name is not on the allow-list."""
        return self.call is None and self.cls is None and self.dtype is None


def describe(thing: Any) -> str:
    """Describe an object of the file, for the message that refuses it."""
    return thing.name if isinstance(thing, Token) else f"a {type(thing).__name__}"


def allowed_class(full: str) -> type | None:
    """Find a class on the allow-list.

    Args:
        full: Module and name of the class, with dots.

    Returns:
        The class, or None if it may not be instantiated.
    """
    return _stock_class(full) or _user_layer(full)


def _user_layer(full: str) -> type | None:
    """Find a layer class in a module of the user. The program must have added a layer of this module to Ultralytics."""
    module, _, name = full.rpartition(".")
    tasks = sys.modules.get("ultralytics.nn.tasks")
    if tasks is None or module.partition(".")[0] in ("torch", "torchvision", "ultralytics"):
        return None
    added = (value for value in vars(tasks).values() if isinstance(value, type) and issubclass(value, nn.Module))
    if module not in {layer.__module__ for layer in added} or module not in sys.modules:
        return None
    found = vars(sys.modules[module]).get(name)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


@lru_cache(maxsize=1024)
def _stock_class(full: str) -> type | None:
    module, _, name = full.rpartition(".")
    home = next((p for p in (*_LAYER_PACKAGES, *_LOSS_MODULES) if f"{module}.".startswith(f"{p}.")), None)
    if full in _PLAIN_CLASSES:
        home = module
    if home is None:
        return None
    importlib.import_module(home)  # a package of the lists above; it imports its submodules itself
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if not isinstance(found, type):
        return None
    known = (
        full in _PLAIN_CLASSES or issubclass(found, nn.Module) or (home in _LOSS_MODULES and found.__module__ == module)
    )
    return found if known else None


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RefusedCall(f"{what} with unusual arguments")


def is_flat(key: Any) -> bool:
    """Return whether hashing a key takes little time: it is no tuple, or a short one of things that are none."""
    nests = (tuple, frozenset)
    return not isinstance(key, nests) or (len(key) <= 16 and not any(isinstance(part, nests) for part in key))


def _are_counts(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _is_shape(sizes: Any) -> bool:
    """Return whether these can be the sizes of a tensor. Python multiplies them without overflow."""
    known = type(sizes) in (tuple, list, torch.Size) and len(sizes) <= MAX_DIMENSIONS and _are_counts(*sizes)
    return known and volume(sizes) <= MAX_ELEMENTS


def _is_text(*parts: Any) -> bool:
    return all(type(part) is str for part in parts) and sum(map(len, parts)) <= MAX_TEXT


def _tensor(storage: Any, offset: int, size: Any, stride: Any, grad: bool, hooks: Any, metadata: Any = None) -> Any:
    name = "torch._utils._rebuild_tensor_v2"
    _require(isinstance(storage, torch.storage.TypedStorage) and not metadata, name)
    _require(type(size) in (tuple, torch.Size) and _is_shape(size), name)
    _require(type(stride) is tuple and len(stride) == len(size) and _are_counts(offset, *stride), name)
    last = sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if all(size) else -1
    if offset + last + 1 > storage._untyped_storage.nbytes() // storage.dtype.itemsize:
        raise UnpicklingError("a tensor is larger than its storage")
    rebuild: Any = torch._utils._rebuild_tensor_v2
    return rebuild(storage, offset, size, stride, grad is True, OrderedDict())  # ignores the hooks of the file


def _parameter(data: Any, grad: bool, hooks: Any, state: Any = ()) -> Any:
    _require(isinstance(data, torch.Tensor) and not state, "torch._utils._rebuild_parameter")
    return nn.Parameter(data, grad is True)


def _ordered_dict(pairs: Any = ()) -> Any:
    known = type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs)
    _require(known and all(is_flat(key) for key, _ in pairs), "collections.OrderedDict")
    return OrderedDict(pairs)


def _set(items: Any) -> Any:
    _require(type(items) is list and all(map(is_flat, items)), "set")
    return set(items)


def _size(sizes: Any) -> Any:
    _require(_is_shape(sizes), "torch.Size")
    return torch.Size(sizes)


def _device(*where: Any) -> Any:
    _require(all(_is_text(part) or type(part) is int for part in where), "torch.device")
    return torch.device(*where)


def _encode(text: Any, encoding: Any) -> Any:  # pickle protocol 2 writes bytes this way
    _require(type(text) is str and encoding == "latin1", "_codecs.encode")
    return text.encode("latin1")


def _path(*parts: Any) -> Any:
    _require(_is_text(*parts), "pathlib.Path")
    return Path(*parts)  # a path class of this system, whichever system wrote the file


def _numpy_dtype(spec: Any, *flags: Any) -> Any:
    _require(type(spec) is str and re.fullmatch(r"[<|=]?[?biufc]\d{0,2}", spec) is not None, "numpy.dtype")
    return np.dtype(spec)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    _require(isinstance(dtype, np.dtype) and type(data) is bytes, "numpy scalar")
    return np.frombuffer(data, dtype, count=1)[0]


def _numpy_array(kind: Any, shape: Any, code: Any) -> Any:
    return np.empty(0)


def numpy_state(target: Any, state: Any) -> bool:
    """Set the state of a NumPy object.

    Args:
        target: The object.
        state: The state in the file.

    Returns:
        True if the state was set. False if `target` is not a NumPy object, or if the state is unusual.
    """
    if isinstance(target, np.dtype):  # the process shares it, so it is not changed: only a little-endian state passes
        return type(state) is tuple and state[1:] in ((o, None, None, None, -1, -1, 0) for o in ("<", "|", "="))
    if isinstance(target, np.ndarray) and type(state) is tuple and len(state) == 5:
        _, shape, dtype, _, data = state
        known = type(data) is bytes and isinstance(dtype, np.dtype) and type(shape) is tuple and _is_shape(shape)
        if known and math.prod(shape) * dtype.itemsize == len(data):
            target.__setstate__(state)
            return True
    return False


def check_layer_state(layer: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a state with which `__setstate__` of a layer would do more than set it.

    Args:
        layer: The layer, which may be incomplete.
        state: Its attributes in the file.

    Raises:
        UnpicklingError: The state is unusual.
    """
    usual = all(type(state.get(name, {})) in (dict, OrderedDict) for name in ("_parameters", "_buffers", "_modules"))
    if isinstance(layer, nn.RNNBase):  # loops over its layers
        rows: Any = state.get("_all_weights")
        usual &= "all_weights" not in state and type(rows) is list and 0 < len(rows) <= 100
        usual = usual and all(type(row) is list and 0 < len(row) <= 10 and _is_text(*row) for row in rows)
    if "num_heads" in state:  # AAttn multiplies them
        usual &= all(type(state.get(name, 0)) is int for name in ("num_heads", "head_dim"))
    if "feats_idx" in state:  # DistillationModel removes its hooks, and adds one for each index
        usual &= all(state.get(name) == [] for name in ("_student_hooks", "_teacher_hooks"))
        usual &= type(state["feats_idx"]) is list and len(state["feats_idx"]) <= 100
    if not usual:
        raise UnpicklingError(f"a {type(layer).__name__} with an unusual state")


def _namespace() -> Any:
    from ultralytics.utils import IterableSimpleNamespace

    return IterableSimpleNamespace()


def _interpolation(value: Any) -> Any:
    _require(_is_text(value), "torchvision.transforms.functional.InterpolationMode")
    return importlib.import_module("torchvision.transforms.functional").InterpolationMode(value)


def _getattr(target: Any, name: Any) -> Any:
    """Run `getattr` for what checkpoints need: a `forward...` method of a layer, or a member of InterpolationMode."""
    _require(_is_text(name), "getattr")
    if isinstance(target, Token) and target.call is _interpolation:
        return _interpolation(name.lower())
    owner = target.cls if isinstance(target, Token) else type(target)
    asked = f"getattr({describe(target)}, {name!r})"
    _require(owner is not None and issubclass(owner, nn.Module) and name.startswith("forward"), asked)
    function = inspect.getattr_static(owner, name, None)
    if not inspect.isfunction(function):
        raise RefusedCall(asked)
    return function if isinstance(target, Token) else function.__get__(target)


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "builtins.getattr": _getattr,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.ndarray": _numpy_array,  # an argument of _reconstruct
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _numpy_array for core in ("core", "_core")},
    **{f"{m}.{system}Path": _path for m in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")},
    "ultralytics.utils.IterableSimpleNamespace": _namespace,
    "torchvision.transforms.functional.InterpolationMode": _interpolation,
}
