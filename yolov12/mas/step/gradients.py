"""Operations on the gradients of many parameters at once: take, give back, add, scale, sum over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from yolov12.mas.distributed.ranks import Ranks

__all__ = ["add", "bytes_of", "give", "scale", "sum_over", "take"]

Gradients = list[Tensor | None]


def take(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Detach the gradients from their parameters and return them; the parameters have none afterwards."""
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def give(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Put gradients on their parameters, and replace those that are there."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add(total: Gradients, more: Gradients, *, is_lent: bool = False) -> Gradients:
    """Add gradients and return the sums; tensors of `total` are changed in place, and None counts as zero.

    Args:
        total: Gradients so far.
        more: Gradients to add.
        is_lent: True if the tensors of `more` will be overwritten, so that the sums must not consist of them.
    """
    if is_lent:  # before anything is changed, as an allocation may fail
        more = [b.clone() if a is None and b is not None else b for a, b in zip(total, more, strict=True)]
    both = [(a, b) for a, b in zip(total, more, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(total, more, strict=True)]


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of the gradients of those parameters that are trained."""
    trained = (parameter for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)


def scale(gradients: Gradients, factor: Tensor) -> None:
    """Multiply gradients in place by a scalar tensor on their device."""
    there = [gradient for gradient in gradients if gradient is not None]
    if there:
        torch._foreach_mul_(there, factor.to(there[0].dtype))


def sum_over(ranks: Ranks, total: Gradients, statistics: Sequence[Tensor], *, is_padding: bool) -> None:
    """Sum gradients and BatchNorm statistics over all ranks, in place.

    Args:
        ranks: Processes that share the batch; all of them call this.
        total: Gradients of this rank's share; None for the same parameters on all ranks.
        statistics: Statistics of this rank's share.
        is_padding: True if the share has weight zero.
    """
    summed = [*(gradient for gradient in total if gradient is not None), *statistics]
    if is_padding:
        torch._foreach_zero_(summed)
    ranks.sum(summed)
