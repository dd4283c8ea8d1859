"""Gradients of many parameters as one thing: set aside, added, scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["add", "give", "scale", "take"]

Gradients = list[Tensor | None]


def take(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Take the gradients off their parameters, which have none afterwards."""
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def give(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Put gradients on their parameters, in place of what is there."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add(total: Gradients, more: Gradients) -> Gradients:
    """Add, in place of `total`; None counts as zero."""
    both = [(a, b) for a, b in zip(total, more, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(total, more, strict=True)]


def scale(gradients: Gradients, factor: Tensor) -> None:
    """Multiply in place by a scalar on the gradients' device."""
    there = [gradient for gradient in gradients if gradient is not None]
    if there:
        torch._foreach_mul_(there, factor.to(there[0].dtype))
