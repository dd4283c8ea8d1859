"""Logical batch: it stays on the host, carries the engine, and shows its readers what stock Ultralytics would show.

Ultralytics' loop calls `preprocess_batch` and passes the result to the model. With the engine, the result is a
`LogicalBatch`. The only seam on a model's call (`call`) recognises it and runs the engine. Stock code handles every
other batch and every other call, so the model of a trainer stays the user's own object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from yolov12.mas.modules import each_tensor
from yolov12.mas.task import Share

__all__ = ["DeferredTensor", "LogicalBatch", "TensorFacts", "call"]


def call(stock: Callable[..., Any], model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' call of a model; for a logical batch that waits for the engine, run the engine.

    Args:
        stock: Ultralytics' own method.
        model: Model that is called.
        args: Arguments for `stock`; the first is images, or a batch.
        kwargs: Further arguments for `stock`.

    Returns:
        Outputs of the model or, for a batch, loss and loss items.
    """
    if not args or not isinstance(args[0], LogicalBatch):
        return stock(model, *args, **kwargs)
    return args[0].run(lambda shown: stock(model, shown, *args[1:], **kwargs), model)


@dataclass(frozen=True)
class TensorFacts:
    """Shape, dtype and device of a tensor whose values are not computed yet."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class LogicalBatch(dict[str, Any]):
    """Batch of an Ultralytics loader that the engine runs.

    Args:
        host: Batch as the loader returned it.
        share: Description of the whole batch over all ranks; None for a training in one process.
        model: Model that the engine trains.
        show: Called with the loader's batch; returns what stock's `preprocess_batch` would return, and leaves the
            random generators as they were.
        engine: Runs the batch on the model; returns its loss and loss items.
    """

    def __init__(
        self,
        host: dict[str, Any],
        share: Share | None,
        model: nn.Module,
        show: Callable[[dict[str, Any]], Mapping[str, Any]],
        engine: Callable[[LogicalBatch], Any],
    ) -> None:
        super().__init__()
        self.host, self.share = host, share
        self._model, self._make, self._engine = model, show, engine
        self._made: Mapping[str, Any] | None = None
        self._is_filled = self._was_run = self._was_written = False
        self._versions: dict[str, int] = {}

    def run(self, stock: Callable[[dict[str, Any]], Any], model: nn.Module) -> Any:
        """Run the batch with the engine the first time that the model trains on it, and otherwise as stock does.

        Args:
            stock: Runs stock's call of the model on an ordinary batch.
            model: Model that is called.
        """
        trains = model is self._model and model.training and torch.is_grad_enabled()
        if self._was_run or not trains or self._is_changed():
            return stock(self.shown())
        self._was_run = True
        return self._engine(self)

    def shown(self) -> dict[str, Any]:
        """Return an ordinary dict with the content that stock would show."""
        self._fill()
        return {key: each_tensor(value, _made) for key, value in dict.items(self)}

    def describe(self, facts: Mapping[str, TensorFacts]) -> None:
        """Show tensors of known shape, dtype and device from now on; they are computed only if their values are used.

        Args:
            facts: Key of the batch → facts of its tensor, as they were seen on parts of the batch.
        """
        if not self._is_filled:
            self._is_filled = True
            tensors = [key for key, value in self.host.items() if isinstance(value, Tensor)]
            deferred = {
                key: DeferredTensor(facts.get(key), partial(self._stock_value, key))
                for key in dict.fromkeys((*tensors, *facts))
            }
            dict.update(self, {**self.host, **deferred})

    def _stock_value(self, key: str) -> Any:
        return self._stock()[key]

    def show_host(self) -> None:
        """Show the loader's batch unchanged from now on."""
        self._is_filled = True
        dict.update(self, self.host)

    def _stock(self) -> Mapping[str, Any]:
        if self._made is None:
            self._made = self._make(dict(self.host))
        return self._made

    def _fill(self) -> None:
        if not self._is_filled:
            self._is_filled = True
            dict.update(self, self._stock())
            self._versions = {key: value._version for key, value in dict.items(self) if isinstance(value, Tensor)}

    def _is_changed(self) -> bool:
        """Return whether somebody has changed the content that this batch shows. The model then gets that content."""
        written = any(dict.__getitem__(self, key)._version != version for key, version in self._versions.items())
        return self._was_written or written

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.shown(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.shown(), memo)


def _reading(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: LogicalBatch, *args: Any, **kwargs: Any) -> Any:
        self._fill()
        return plain(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, plain.__doc__
    return method


def _writing(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: LogicalBatch, *args: Any, **kwargs: Any) -> Any:
        self._fill()
        self._was_written = True
        return plain(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, plain.__doc__
    return method


for _name in ("__contains__", "__eq__", "__getitem__", "__iter__", "__len__", "__or__", "__repr__", "__reversed__"):
    setattr(LogicalBatch, _name, _reading(_name))
for _name in ("__ror__", "copy", "get", "items", "keys", "values"):
    setattr(LogicalBatch, _name, _reading(_name))
for _name in ("__delitem__", "__ior__", "__setitem__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(LogicalBatch, _name, _writing(_name))


class DeferredTensor(Tensor):
    """Tensor that is computed when its values are used. Its shape, dtype and device may be known before.

    Args:
        facts: Shape, dtype and device; None if they are not known.
        make: Computes the tensor.
    """

    _facts: TensorFacts | None
    _make: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls, facts: TensorFacts | None, make: Callable[[], Tensor]) -> DeferredTensor:
        """Create a tensor without values."""
        tensor: DeferredTensor = torch.empty(0).as_subclass(cls)
        tensor._facts, tensor._make, tensor._value = facts, make, None
        return tensor

    def __init__(self, facts: TensorFacts | None, make: Callable[[], Tensor]) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Answer from the facts if they suffice; otherwise compute the tensor and run the function on it."""
        first = args[0] if args else None
        if isinstance(first, cls) and first._facts is not None and func in _FROM_FACTS:
            return _FROM_FACTS[func](first._facts, *args[1:])
        args, kwargs = each_tensor((args, dict(kwargs or {})), _made)
        return func(*args, **kwargs)


def _made(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DeferredTensor):
        return tensor
    if tensor._value is None:
        tensor._value = tensor._make()
    return tensor._value


def _size(facts: TensorFacts, dim: int | None = None) -> Any:
    return facts.shape if dim is None else facts.shape[dim]


_FROM_FACTS: Mapping[Any, Callable[..., Any]] = {
    Tensor.shape.__get__: lambda facts: facts.shape,  # type: ignore[attr-defined,unused-ignore]
    Tensor.size: _size,
    Tensor.__len__: lambda facts: facts.shape[0],
    Tensor.dim: lambda facts: len(facts.shape),
    Tensor.ndim.__get__: lambda facts: len(facts.shape),  # type: ignore[attr-defined,unused-ignore]
    Tensor.numel: lambda facts: facts.shape.numel(),
    Tensor.dtype.__get__: lambda facts: facts.dtype,  # type: ignore[attr-defined,unused-ignore]
    Tensor.device.__get__: lambda facts: facts.device,  # type: ignore[attr-defined,unused-ignore]
}
