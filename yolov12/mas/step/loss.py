"""The loss and gradient of a batch from those of its parts.

A loss is numerator / normaliser, both sums over images, and the normaliser of the batch (for detection the sum of
target scores) is known only after its last part, on all ranks. So numerators are differentiated, divided by a guess
that keeps half precision in range, and the gradient is multiplied by guess / normaliser at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from yolov12.mas.distributed.ranks import Ranks
from yolov12.mas.step import gradients
from yolov12.mas.task import Loss

__all__ = ["Total"]


class Total:
    """Adds up numerators, normalisers and gradients of the parts of a batch.

    Args:
        images: In the batch, over all ranks.
        floor: See `task.Task`.
        per_image: Normaliser of an image in the batch before, for the guess; the first part may hold nothing to find.
    """

    def __init__(self, images: int, floor: float, per_image: Tensor | None = None) -> None:
        self._images, self._floor, self._per_image = images, max(floor, 1e-12), per_image
        self._guess: Tensor | None = None
        self._gradients: gradients.Gradients | None = None
        self._parts: list[tuple[Tensor, Tensor, Mapping[str, Tensor]]] = []
        self._sum: Tensor | None = None  # of normalisers, over all ranks
        self._whole: tuple[Tensor, dict[str, Tensor]] | None = None  # loss and items, over all ranks

    def scaled(self, loss: Loss, images: int) -> Tensor:
        """The part's numerator over the guess of the batch's normaliser."""
        normaliser = self._as_tensor(loss)
        if not self._parts and images == self._images:
            self._guess = normaliser.clamp(min=self._floor)  # no guess: the factor below is exactly 1
        elif not self._parts:  # also after a failure: what ran then may have been of another size
            # A power of two, so that scaling back at the end is exact.
            expected = (normaliser * (self._images / images)).clamp(min=max(self._floor, 1e-6))
            if self._per_image is not None:
                # A batch that broke must not break the next.
                before = torch.nan_to_num(self._per_image, nan=0.0, posinf=0.0)
                expected = torch.maximum(expected, before.to(expected) * self._images)
            self._guess = torch.exp2(torch.log2(expected).round())
        return loss.value.sum() * (normaliser.clamp(min=self._floor) / self._guess)

    def add(self, loss: Loss, new: gradients.Gradients | None = None) -> None:
        """Take in a part that is done, with its gradients if it has any."""
        if new is not None:
            self._gradients = new if self._gradients is None else gradients.add(self._gradients, new)
        items = {name: item.detach() for name, item in loss.items.items()}
        self._parts.append((self._as_tensor(loss), loss.value.detach(), items))

    def sum_over(self, ranks: Ranks, *, counts: bool = True) -> None:
        """Make loss, items and normaliser those of all ranks; the gradients finished here are then for summing up.

        Args:
            ranks: All of them do this.
            counts: Whether what was added here is part of the batch.
        """
        if ranks.size == 1:
            return
        _, value, items = self._parts[0]
        names = sorted(items)  # of the same order on all ranks
        numerators = [torch.zeros_like(number, dtype=torch.float64) for number in _numbers(value, items, names)]
        self._sum = self.unfloored() if counts else torch.zeros_like(self.unfloored())
        for normaliser, part, items in self._parts if counts else ():
            weight = normaliser.clamp(min=self._floor)
            torch._foreach_add_(numerators, [number * weight for number in _numbers(part, items, names)])
        ranks.sum([self._sum, *numerators])
        loss, *rest = [(number / self.normaliser()).to(value.dtype) for number in numerators]
        self._whole = loss, dict(zip(names, rest, strict=True))

    def finished_gradients(self) -> gradients.Gradients:
        """Gradients of the batch's loss."""
        assert self._gradients is not None
        assert self._guess is not None
        if len(self._parts) > 1 or self._whole is not None:
            gradients.scale(self._gradients, self._guess / self.normaliser())
        return self._gradients

    def loss(self) -> Tensor:
        """The batch's loss."""
        return self._whole[0] if self._whole else self._combined([value for _, value, _ in self._parts])

    def items(self) -> dict[str, Tensor]:
        """The batch's items."""
        if self._whole:
            return self._whole[1]
        return {name: self._combined([items[name] for *_, items in self._parts]) for name in self._parts[0][2]}

    def _combined(self, values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        shares = [normaliser.clamp(min=self._floor) / self.normaliser() for normaliser, *_ in self._parts]
        return sum((value * share for value, share in zip(values, shares, strict=True)), torch.zeros_like(values[0]))

    def normaliser(self) -> Tensor:
        """The batch's, or the floor."""
        return self.unfloored().clamp(min=self._floor)

    def unfloored(self) -> Tensor:
        """The batch's normaliser, however small."""
        return torch.stack([normaliser for normaliser, *_ in self._parts]).sum() if self._sum is None else self._sum

    @staticmethod
    def _as_tensor(loss: Loss) -> Tensor:
        if isinstance(loss.normaliser, Tensor):
            return loss.normaliser.detach().double()  # counts and half precision do not add up exactly
        # Filled on the device: a copy would wait for it.
        return torch.full((), float(loss.normaliser), device=loss.value.device, dtype=torch.float64)


def _numbers(value: Tensor, items: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    return [value, *(items[name] for name in names)]
