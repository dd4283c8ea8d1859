"""Terms of Ultralytics' losses and their normalisers, read while the loss runs, so that no loss code is copied.

A loss of Ultralytics is a vector of terms. The terms of boxes and classes are divided by the sum of target scores,
those of masks and keypoints by the number of foreground anchors. A model with two heads has the terms of both, each
with its own normalisers; their sum no longer tells which is which. So each head returns its terms in a row of its own.

| term | normaliser |
|---|---|
| box, cls, dfl (or l1), angle | sum of target scores |
| seg, pose, kobj | number of foreground anchors |
| sem | number of images, if any image has a foreground anchor |
| rle | number of visible keypoints; it counts only if it is positive over the batch |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.task import Loss
from yolov12.models.assigner import in_slices

__all__ = ["has_one_normaliser", "has_terms", "loss_of_terms"]

_ONE = ("v8DetectionLoss", "v8OBBLoss")
_SEVERAL = ("v8SegmentationLoss", "v8PoseLoss", "SegmentLoss26", "PoseLoss26")
_TWO_HEADS = ("E2ELoss", "E2EDetectLoss")

_NORMALISERS = {
    **dict.fromkeys(("box_loss", "cls_loss", "dfl_loss", "l1_loss", "angle_loss"), "scores"),
    **dict.fromkeys(("seg_loss", "pose_loss", "kobj_loss"), "foreground"),
    "sem_loss": "images",
    "rle_loss": "visible",
}

_Run = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]


def has_one_normaliser(criterion: Any) -> bool:
    """Return whether all terms of one of Ultralytics' criteria are divided by the sum of target scores."""
    return type(criterion).__name__ in _ONE


def has_terms(criterion: Any) -> bool:
    """Return whether the terms of one of Ultralytics' criteria have several normalisers that are known here."""
    if type(criterion).__name__ in _TWO_HEADS:
        return all(type(head).__name__ in (*_ONE, *_SEVERAL) for head in _heads(criterion))
    return type(criterion).__name__ in _SEVERAL


def _heads(criterion: Any) -> tuple[Any, ...]:
    return (criterion.one2many, criterion.one2one) if type(criterion).__name__ in _TWO_HEADS else (criterion,)


def loss_of_terms(criterion: Any, run: _Run) -> Loss:
    """Run the loss of a part, and read the normaliser of each of its terms.

    Args:
        criterion: Criterion that `has_terms`.
        run: Runs the loss with this criterion; returns it with its items.

    Returns:
        The loss, of shape (terms,), or (heads, terms) for two heads.
    """
    heads = _heads(criterion)
    normalisers = [torch.empty(0)] * len(heads)
    with ExitStack() as stack:
        for index, head in enumerate(heads):
            stock = head.loss
            vars(head)["loss"] = partial(_loss_of_head, head, index, normalisers, stock)
            stack.callback(vars(head).pop, "loss")
        value, items = run()
    shape = value.shape
    return Loss(
        value,
        torch.stack(normalisers).reshape(shape),
        {name: item.reshape(shape) for name, item in items.items()},
        times_images=True,
        factors=partial(_factors, heads[0].loss_names),
    )


def _loss_of_head(
    head: Any,
    index: int,
    normalisers: list[Tensor],
    stock: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
    predictions: Any,
    batch: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the loss of one head; return its terms and items in the row of this head, with zeros for other heads."""
    is_semantic = isinstance(predictions.get("proto"), tuple)
    with in_slices(head.assigner) as sums, _counting(head, is_semantic=is_semantic) as counts:
        value, items = stock(predictions, batch)
    counts |= {"scores": sums[0], "images": value.new_full((), len(predictions["boxes"]))}
    normalisers[index] = torch.stack([counts[_NORMALISERS[name]].double() for name in head.loss_names])
    rows = len(normalisers)
    if rows == 1:
        return value, dict(zip(items, torch.diag(torch.stack(list(items.values()))), strict=True))
    mine = torch.zeros(rows, 1, dtype=value.dtype, device=value.device)
    mine[index] = 1
    each = torch.diag(torch.stack(list(items.values())))
    return mine * value, {name: mine * item for name, item in zip(items, each, strict=True)}


@contextmanager
def _counting(head: Any, *, is_semantic: bool) -> Iterator[dict[str, Tensor]]:
    """Count what the terms of a head are divided by, while its loss runs.

    Two terms of a part do not tell their numerators, so the loss is made to. Without a foreground anchor, it leaves out
    the semantic term, which other parts may need. And it clamps the likelihood of keypoints part by part.
    """
    counts: dict[str, Tensor] = {}

    def assigned(module: Any, inputs: Any, output: Any) -> None:
        foreground = output[3]
        count = counts["foreground"] = foreground.sum()
        counts["visible"] = torch.zeros_like(count)
        if is_semantic:
            foreground.sum = lambda: count.clamp(min=1)

    def likely(module: Any, inputs: Any, output: Tensor) -> None:
        counts["visible"] = torch.full_like(counts["foreground"], len(inputs[0]))
        itself = weakref.ref(output)  # no cycle, which would keep the graph until the garbage collector runs
        output.clamp = lambda min: itself()  # type: ignore[method-assign,assignment]

    handles = [head.assigner.register_forward_hook(assigned)]
    if getattr(head, "rle_loss", None) is not None:
        handles.append(head.rle_loss.register_forward_hook(likely))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _factors(names: Sequence[str], value: Tensor, normaliser: Tensor) -> Tensor:
    """Return 1 for each term that counts in the whole batch and 0 for one that does not."""
    factors = torch.ones_like(value)
    if "rle_loss" in names:
        index = names.index("rle_loss")
        factors[..., index] = value[..., index] >= 0
    if "sem_loss" in names:
        factors[..., names.index("sem_loss")] = normaliser[..., names.index("seg_loss")] > 0
    return factors
