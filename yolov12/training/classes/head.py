"""Classification rows of a model that is trained for other classes than before.

The last convolution of each classification branch has a row of weights and a bias for each class. Ultralytics copies
the rows of classes that have the same name in the new data, in all branches (`BaseModel.load`), and a new class starts
with random weights. It takes names that differ only in upper and lower case for one class, also where the data has
both, such as `a` and `A`. This module corrects such rows, finds out which classes the model knew before, and lets new
classes start from the mean of these: what tells objects from background is common to them (benchmarks/classes.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from yolov12.training.classes.names import counted, hint, listed, match, renamed, tells_names

__all__ = ["ClassChange", "keep_by_name", "known_names", "load", "silence", "start_new"]

_SEMANTIC = "proto.semseg"  # semantic branch of YOLO26's segmentation, which only a training uses
_SILENT = -1e4  # bias of a class that is never predicted; a number that half precision has


@dataclass(frozen=True)
class ClassChange:
    """Classes of a training, compared with those of the model that it began with."""

    names: Mapping[int, str]
    """Class id → name in the training."""
    counterparts: tuple[int | None, ...]
    """For each class id of the training, that of the model it began with; None for a new class."""
    gone: tuple[str, ...]
    """Names that the model knew and the data does not have."""
    renamed: tuple[str, ...] = ()
    """Classes that keep their weights under a new name, each as `old to new`."""

    @property
    def new(self) -> list[int]:
        """Ids of classes that the model did not know."""
        return [index for index, counterpart in enumerate(self.counterparts) if counterpart is None]

    @property
    def is_none(self) -> bool:
        """True if the classes are the same, in the same order."""
        return not self.gone and not self.renamed and self.counterparts == tuple(range(len(self.names)))

    @property
    def knows_none(self) -> bool:
        """True if the model knew none of the classes."""
        return len(self.new) == len(self.names)

    @property
    def hint(self) -> str | None:
        """Value of `rename` for new classes whose names are like those of old ones; None if there are none."""
        return hint(self.gone, (self.names[index] for index in self.new))

    def __str__(self) -> str:
        """Return what happens to the classes, as one line for the log."""
        new = [self.names[index] for index in self.new]
        if self.knows_none:
            text = f"no class of the data has the name of one of the model's {counted(len(self.gone))}"
            return text + (": each keeps the weights of its number" if len(self.gone) == len(new) else "")
        text = f"{len(self.names) - len(new)} of {counted(len(self.names))} keep their weights, found by name"
        for word, names in (("renamed", self.renamed), ("new", new), ("no longer there", self.gone)):
            text += f"; {word}: {listed(names)}" if names else ""
        return text


@dataclass(frozen=True)
class _Source:
    """What a model was loaded from."""

    names: Mapping[int, str]
    rows: Mapping[str, tuple[Tensor, Tensor]]  # name of a classification layer → weight and bias
    copied: bool = True  # whether Ultralytics knew the names when it copied rows


_sources: weakref.WeakKeyDictionary[nn.Module, _Source] = weakref.WeakKeyDictionary()


def load(stock: Callable[..., Any], model: nn.Module, /, weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `BaseModel.load`, and remember the classes of the weights.

    Args:
        stock: Ultralytics' own method.
        model: Model that gets the weights.
        weights: Model or checkpoint.
        args: Further positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.
    """
    done = stock(model, weights, *args, **kwargs)
    source = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
    _sources.pop(model, None)
    names = getattr(source, "names", None)
    if tells_names(names):
        rows = {name: (weight.clone(), bias.clone()) for name, weight, bias in _rows(source)}
        _sources[model] = _Source(dict(names), rows)
    elif isinstance(source, nn.Module) and source in _sources:
        # A model from a yaml, with weights of other classes. It has no names, and its own rows are random.
        _sources[model] = replace(_sources[source], copied=False)
    return done


def known_names(model: Any) -> Mapping[int, str] | None:
    """Return the classes of the weights that a model has, or of those that it was loaded from; None without names.

    Args:
        model: Model that a training begins with.
    """
    names = getattr(model, "names", None)
    if tells_names(names):
        return names
    return _sources[model].names if isinstance(model, nn.Module) and model in _sources else None


def keep_by_name(
    model: nn.Module, names: Mapping[int, str] | None, rename: Mapping[str, str] | None = None
) -> ClassChange | None:
    """Correct the rows of classes to which Ultralytics gave no row, or the row of another class.

    Args:
        model: Model with loaded weights.
        names: Class id → name in the training; None if they are not known.
        rename: Old name → new name of classes that were renamed; None if none were.

    Returns:
        The classes before and now; None if the model has no classes by name, or was not loaded from weights with such
        a head.
    """
    source, rows = _sources.get(model), list(_rows(model))
    if source is None or not rows or not tells_names(names):
        return None
    if not all(_fits(source, name, weight) for name, weight, _ in rows if _SEMANTIC not in name):
        return None  # another head, of which nothing or only biases were copied
    now = renamed(source.names, rename)
    counterparts = match(now, names)
    copied = _copied(source.names, names) if source.copied else [None] * len(names)
    wrong = [
        (index, counterpart)
        for index, (counterpart, theirs) in enumerate(zip(counterparts, copied, strict=True))
        if counterpart is not None and counterpart != theirs
    ]
    for name, weight, bias in rows:
        if _fits(source, name, weight):
            old_weight, old_bias = source.rows[name]
            for index, counterpart in wrong:
                weight[index], bias[index] = old_weight[counterpart].to(weight), old_bias[counterpart].to(bias)
    gone = (name for index, name in source.names.items() if index not in counterparts)
    others = (f"{name} to {now[index]}" for index, name in source.names.items() if now[index] != name)
    return ClassChange(dict(names), tuple(counterparts), tuple(gone), tuple(others))


def start_new(model: nn.Module, change: ClassChange) -> None:
    """Let new classes start from the mean of the known ones, weights and biases.

    Args:
        model: Model for which `keep_by_name` returned the change.
        change: Its classes, of which at least one is known.
    """
    known = [index for index in change.names if index not in change.new]
    for name, weight, bias in _rows(model):
        if change.new and _fits(_sources[model], name, weight):
            weight[change.new], bias[change.new] = weight[known].mean(0), bias[known].mean()


def silence(model: nn.Module, classes: list[int]) -> None:
    """Let a model predict none of these classes.

    Args:
        model: Detection model, which is changed.
        classes: Class ids.
    """
    for _, _, bias in _rows(model):
        bias[classes] = _SILENT


def _fits(source: _Source, name: str, weight: Tensor) -> bool:
    return name in source.rows and source.rows[name][0].shape[1:] == weight.shape[1:]


def _copied(old: Mapping[int, str], new: Mapping[int, str]) -> list[int | None]:
    """Return for each new class the old class whose row Ultralytics copies: of namesakes in lower case, the last."""
    last = {str(name).strip().lower(): index for index, name in old.items()}
    return [last.get(str(new[index]).strip().lower()) for index in range(len(new))]


def _rows(model: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, weight and bias of each layer with a row for each class: the last of each classification branch."""
    from ultralytics.nn.modules.head import Detect, WorldDetect, YOLOEDetect

    for name, head in model.named_modules() if isinstance(model, nn.Module) else ():
        if not isinstance(head, Detect) or isinstance(head, (WorldDetect, YOLOEDetect)):
            continue
        branches = {
            f"{branch}.{level}": layers
            for branch in ("cv3", "one2one_cv3")
            for level, layers in enumerate(getattr(head, branch, None) or ())
        }
        branches[_SEMANTIC] = getattr(getattr(head, "proto", None), "semseg", None) or [None]
        for branch, layers in branches.items():
            row = layers[-1]
            if isinstance(row, nn.Conv2d) and row.bias is not None and row.out_channels == head.nc:
                yield f"{name}.{branch}", row.weight.detach(), row.bias.detach()
