"""Logical batch: it stays on the host, is run by the engine, and shows readers what stock Ultralytics would show.

Ultralytics' loop calls `preprocess_batch` and passes the result to the model. If the engine runs the training, this
result is a `LogicalBatch`. The replaced call of the model (`call`) recognises it and runs the engine. All other batches
go to Ultralytics' own call. `trainer.model` therefore needs no wrapper: it stays the user's own object.

Code of the user, such as a callback, may read a logical batch. If it does so before the model receives the batch, the
whole batch is preprocessed at once. The model then trains on the result, including all changes that the user's code has
made to it. If the user's code reads the batch later, the batch is preprocessed again, with the same random image size.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from yolov12.mas import compile_ahead
from yolov12.mas.task import Share
from yolov12.training.adapter.deferred_tensor import DeferredTensor, TensorFacts, made

__all__ = ["SAME", "UNKNOWN", "LogicalBatch", "call"]

SAME = "same"
"""Used in place of the facts of a tensor: preprocessing does not change this value of the loader's batch."""
UNKNOWN = "unknown"
"""Used in place of the facts of a tensor: the value is known only after the batch has been preprocessed."""


def call(stock: Callable[..., Any], model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' call of a model. For a logical batch, see `LogicalBatch.run`.

    Args:
        stock: Ultralytics' own method.
        model: Model that is called.
        args: Arguments for `stock`. The first one is images or a batch.
        kwargs: Further arguments for `stock`.

    Returns:
        Outputs of the model or, for a batch, loss and loss items.
    """
    if not args or not isinstance(args[0], LogicalBatch):
        return stock(model, *args, **kwargs)
    return args[0].run(lambda shown: stock(model, shown, *args[1:], **kwargs), model)


class _Source:
    """Content that stock Ultralytics would show for a batch. It is computed when it is needed, and only once.

    Deferred tensors refer to this object. The object does not refer to the `LogicalBatch`, because a reference cycle
    would delay the release of its memory.
    """

    def __init__(self, host: dict[str, Any], preprocess: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self.host, self.preprocess = host, preprocess
        self._made: Mapping[str, Any] | None = None

    def make(self) -> Mapping[str, Any]:
        if self._made is None:
            with torch.inference_mode(False):  # the reader may be in this mode, but the model trains on the result
                self._made = self.preprocess(dict(self.host))
        return self._made

    def value(self, key: str) -> Any:
        return self.make()[key]


class LogicalBatch(dict[str, Any]):
    """Batch of an Ultralytics loader, for the engine. `LogicalBatch.of` creates it.

    Generic code may call `type(batch)(...)` to create a batch of the same type. This returns a plain dictionary.
    """

    host: dict[str, Any]
    """The loader's batch."""
    share: Share | None
    """Description of the whole batch over all ranks; None for a training in one process."""
    is_seen: bool
    """True if the content was read before the engine ran the batch."""
    is_placeholder: bool
    """True in place of a batch that was trained on before an interruption, see `show_host`."""
    _model: nn.Module
    _source: _Source
    _engine: Callable[[LogicalBatch], Any]
    _is_filled: bool
    _was_run: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a plain dictionary."""
        return dict(*args, **kwargs)

    @classmethod
    def of(
        cls,
        host: dict[str, Any],
        share: Share | None,
        model: nn.Module,
        preprocess: Callable[[dict[str, Any]], Mapping[str, Any]],
        engine: Callable[[LogicalBatch], Any],
    ) -> LogicalBatch:
        """Make a logical batch.

        Args:
            host: The loader's batch.
            share: Description of the whole batch over all ranks; None for a training in one process.
            model: Model that the engine trains.
            preprocess: Ultralytics' `preprocess_batch`.
            engine: Runs the batch on that model; returns its loss and loss items.
        """
        batch: LogicalBatch = dict.__new__(cls)
        batch.host, batch.share, batch.is_seen, batch.is_placeholder = host, share, False, False
        batch._model, batch._source, batch._engine = model, _Source(host, preprocess), engine
        batch._is_filled = batch._was_run = False
        return batch

    def run(self, stock: Callable[[dict[str, Any]], Any], model: nn.Module) -> Any:
        """Run the batch with the engine if this is its first call in training mode; otherwise call `stock`.

        The engine runs the batch only for the model that it trains, and only if gradients are enabled.

        Args:
            stock: Runs Ultralytics' call of the model on an ordinary batch.
            model: Model that is called.
        """
        trains = model is self._model and model.training and torch.is_grad_enabled()
        if self._was_run or not trains:
            return stock(self.shown())
        self._was_run = True
        found = self._engine(self)
        if not self.is_placeholder:
            compile_ahead.end()  # what a batch needs was launched
        return found

    def shown(self) -> dict[str, Any]:
        """Return an ordinary dict with the content that stock would show."""
        self._fill()
        self._settle()
        return {key: made(value) for key, value in dict.items(self)}

    def describe(
        self,
        facts: Mapping[str, TensorFacts | str],
        preprocess: Callable[[dict[str, Any]], Mapping[str, Any]],
        host: dict[str, Any] | None = None,
    ) -> None:
        """Set the content that the batch shows after it has run. Do nothing if it shows its content already.

        Tensors are created only when their values are used.

        Args:
            facts: Key of the batch after preprocessing → facts of its tensor, `SAME` or `UNKNOWN`.
            preprocess: Ultralytics' `preprocess_batch`, with the same random image size as for the model.
            host: The batch that ran. Its images may be smaller than those of the loader's batch.
        """
        if self._is_filled:
            return
        self._is_filled, self._source = True, _Source(host or self.host, preprocess)
        for key, value in facts.items():
            shown: Any = _Later()
            if isinstance(value, TensorFacts):
                shown = DeferredTensor(value, partial(self._source.value, key))
            elif value == SAME:
                shown = self._source.host[key]
            dict.__setitem__(self, key, shown)

    def show_host(self) -> None:
        """Show the loader's batch from now on, without preprocessing, as it is a placeholder."""
        self._is_filled = self.is_placeholder = True
        dict.update(self, self.host)

    def _fill(self) -> None:
        if not self._is_filled:
            shown = self._source.make()
            self._is_filled = self.is_seen = True
            dict.update(self, shown)

    def _settle(self, *keys: str) -> None:
        """Replace `_Later` objects by the values that they stand for: under the given keys, or under all keys."""
        for key in keys or list(dict.keys(self)):
            if isinstance(dict.get(self, key), _Later):
                dict.__setitem__(self, key, self._source.value(key))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol == 2:  # that of torch.save. From PyTorch 2.6 on, torch.load refuses the name `dict` in a file.
            return OrderedDict, (), None, None, iter(self.shown().items())
        return dict, (self.shown(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.shown(), memo)


class _Later:
    """Placeholder of a value that is known only after the batch has been preprocessed."""


def _looking(name: str, settle: Callable[..., None]) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: LogicalBatch, *args: Any, **kwargs: Any) -> Any:
        self._fill()
        settle(self, *args)
        return plain(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, plain.__doc__
    return method


for _name in ("__contains__", "__delitem__", "__iter__", "__len__", "__reversed__", "__setitem__", "clear", "keys"):
    setattr(LogicalBatch, _name, _looking(_name, lambda *_: None))
for _name in ("__getitem__", "get", "pop", "setdefault"):
    setattr(LogicalBatch, _name, _looking(_name, lambda self, key, *_: self._settle(key)))
for _name in ("__eq__", "__ior__", "__ne__", "__or__", "__repr__", "__ror__"):
    setattr(LogicalBatch, _name, _looking(_name, lambda self, *_: self._settle()))
for _name in ("copy", "items", "popitem", "update", "values"):
    setattr(LogicalBatch, _name, _looking(_name, lambda self, *_: self._settle()))
