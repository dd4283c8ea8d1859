"""A user's own code in the place of Ultralytics': whether a function is one, and what a batch shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from yolov12.errors import ConfigError
from yolov12.mas.modules import LIBRARIES, forward_of, module_of
from yolov12.mas.oom import is_out_of_memory
from yolov12.mas.step.snapshots import RandomState
from yolov12.training.adapter.logical_batch import LogicalBatch

__all__ = [
    "Notices",
    "Replaced",
    "check_split",
    "forward_of",
    "has_own_layers",
    "is_ultralytics",
    "module_of",
    "show_whole",
]


def is_ultralytics(function: Any) -> bool:
    """Return whether a function or method is Ultralytics' own code.

    A function of the user's may bear the name and the module of the one that it replaces, as with `functools.wraps`.
    """
    return module_of(function).startswith("ultralytics.")


def has_own_layers(model: nn.Module) -> bool:
    """Return whether layers or forward hooks in a model are the user's own, which may keep what they see.

    Args:
        model: The model. A `forward` of its own does not count.
    """
    for module in model.modules():
        functions = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if module is not model:
            functions.append(forward_of(module))
        if not all(module_of(each).startswith(LIBRARIES) for each in functions):
            return True
    return False


class Replaced:
    """Methods of an object that others stand for.

    Args:
        owner: The object.
        methods: Name of a method → function that is called in place of it.
    """

    def __init__(self, owner: Any, **methods: Callable[..., Any]) -> None:
        self._owner, self._methods = owner, methods
        self._before = {name: vars(owner)[name] for name in methods if name in vars(owner)}
        vars(owner).update(methods)

    def restore(self) -> None:
        """Put the methods back, except for those that the user has replaced since."""
        own = vars(self._owner)
        for name, method in self._methods.items():
            if own.get(name) == method:
                del own[name]
                own.update({name: self._before[name]} if name in self._before else {})


class Notices:
    """Lines of the log about how batches run.

    Args:
        silent: True for a rank that writes none.
    """

    def __init__(self, *, silent: bool) -> None:
        self._silent, self._said = silent, set[str]()
        self.latest = ""
        """What holds for the batches now; empty if the engine runs them, and there is nothing to say of it."""

    def hold(self, line: str) -> None:
        """Log what holds for the batches from now on, unless it was said."""
        if line and line != self.latest:
            self._write(line)
        self.latest = line

    def once(self, line: str) -> None:
        """Log a line, unless it was said at any time."""
        if line not in self._said:
            self._write(line)
        self._said.add(line)

    def _write(self, line: str) -> None:
        from ultralytics.utils import LOGGER

        if not self._silent:
            LOGGER.info(line)


def show_whole(batch: LogicalBatch, device: torch.device, release: Callable[[], None], notices: Notices) -> None:
    """Call a `preprocess_batch` of the user's own as stock does: once, with the whole batch.

    What it draws, mixes, counts or keeps is then that of stock, however the batch is split and whatever runs before. If
    memory does not suffice for that, it is called with each part.

    Args:
        batch: Batch that the model has not had.
        device: Device of the model.
        release: Releases memory after a failed allocation.
        notices: Lines of the log.
    """
    state = RandomState(device)
    try:
        batch.shown()
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    state.restore()
    release()
    notices.once("memory: preprocess_batch is called with parts of a batch, as it does not fit as a whole")


def check_split(key: str, notices: Notices, *, is_training: bool) -> None:
    """Say that it is not known how to split a value of a batch that was split.

    Args:
        key: Key and length of the value.
        notices: Lines of the log.
        is_training: True after the first update.

    Raises:
        ConfigError: The training has not begun.
    """
    line = f"the batch was split, but the value of {key} has an entry neither for each image nor for each object"
    if not is_training:
        raise ConfigError(
            f"{line}: give it one of these lengths, put it into a dictionary, which every part gets as a whole, or "
            "train with a smaller batch or mas=False"
        )
    notices.once(f"memory: {line}: every part got all of it")
