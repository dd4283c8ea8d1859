"""Partners of an image in mosaic, mixup and their like, in a training with old images.

Ultralytics draws them from all images with equal chances: for mixup, cutmix and copy-paste always, for mosaic with
`cache=ram`. Of 100 new and 10,000 old images nearly all partners would be old, whatever `replay_fraction` is. Here, a
partner is old with the probability `replay_fraction`. Without `cache=ram`, mosaic takes images of the same batch, which
have this mixture already.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["balance"]

_COUNTS = "_yolov12_replay"  # attribute of a data set: number of new and of old images, and fraction of the old


def balance(dataset: Any, new: int, old: int, fraction: float) -> None:
    """Let the transforms of a data set draw partners as its sampler draws images.

    Args:
        dataset: Training data set of Ultralytics with the new images first.
        new: Number of new images.
        old: Number of old images.
        fraction: Fraction of old images that is wanted.
    """
    if new and old:
        setattr(dataset, _COUNTS, (new, old, fraction))
        dataset.build_transforms = functools.partial(_build, dataset.build_transforms)  # also called later
        _join(dataset.transforms)


def _build(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _join(stock(*args, **kwargs))


def _join(transforms: Any) -> Any:
    from ultralytics.data.augment import BaseMixTransform

    for transform in _parts(transforms):
        if isinstance(transform, BaseMixTransform):
            transform.get_indexes = functools.partial(_indices, transform)  # goes to spawned workers, too
    return transforms


def _parts(transform: Any) -> Iterator[Any]:
    yield transform
    inner = getattr(transform, "transforms", None)
    for part in [*(inner if isinstance(inner, (list, tuple)) else ()), getattr(transform, "pre_transform", None)]:
        if part is not None:
            yield from _parts(part)


def _indices(transform: Any) -> Any:
    """Return indices in the form of the transform's own `get_indexes`: one, or a list."""
    found = type(transform).get_indexes(transform)
    if getattr(transform, "buffer_enabled", False):
        return found
    new, old, fraction = getattr(transform.dataset, _COUNTS)
    drawn = [
        new + random.randrange(old) if random.random() < fraction else random.randrange(new)
        for _ in (found if isinstance(found, list) else [found])
    ]
    return drawn if isinstance(found, list) else drawn[0]
