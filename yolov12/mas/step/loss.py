"""Loss and gradient of a batch, computed from the losses and gradients of its parts.

A loss is numerator / normaliser, and both are sums over images. The normaliser of the batch (in detection, the sum of
target scores) is known only after the last part on all ranks. So the numerator of each part is divided by an estimate,
which keeps half precision in range, and then differentiated. At the end the gradient is multiplied by
estimate / normaliser.

A loss of several terms with different normalisers needs the normalisers of the batch before: they are the sums of an
earlier pass without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yolov12.mas.distributed.ranks import Ranks
from yolov12.mas.step import gradients
from yolov12.mas.step.retry import Retry
from yolov12.mas.task import Loss

__all__ = ["Total", "UnknownNormalisersError"]


class UnknownNormalisersError(Exception):
    """A part has several normalisers, and those of the batch are needed before it is differentiated."""


class _Part(NamedTuple):
    """Loss of a finished part, detached from its graph."""

    normaliser: Tensor
    value: Tensor
    items: Mapping[str, Tensor]


class Total:
    """Sums of numerators, normalisers and gradients over the parts of a batch.

    Args:
        images: Number of images in the batch, over all ranks.
        floor: Smallest normaliser, see `task.Task.floor`.
        per_image: Normaliser per image of the previous batch, for the estimate, as the first part may hold no target.
        ahead: Sums over the same batch from a pass without gradients, for a loss with several normalisers.
        exact: False to weight the parts of a loss with several normalisers by their numbers of images.
        is_shared: True if several ranks share the batch. They have to do the same, also if one of them has all images.
    """

    def __init__(
        self,
        images: int,
        floor: float,
        per_image: Tensor | None = None,
        *,
        ahead: Total | None = None,
        exact: bool = True,
        is_shared: bool = False,
    ) -> None:
        self._images, self._floor, self._per_image = images, max(floor, 1e-12), per_image
        self.ahead, self._exact, self._is_shared = ahead, exact, is_shared
        self._factors: Callable[[Tensor, Tensor], Tensor] | None = None
        self._estimate: Tensor | None = None
        self._gradients: gradients.Gradients | None = None
        self._parts: list[_Part] = []
        self._sum: Tensor | None = None  # sum of normalisers over all ranks
        self._whole: tuple[Tensor, dict[str, Tensor]] | None = None  # loss and items, over all ranks

    def scaled(self, loss: Loss, images: int) -> Tensor:
        """Return the scalar to differentiate: a part's numerator divided by the estimate of the batch's normaliser.

        Args:
            loss: Loss of the part.
            images: Number of images in the part.

        Raises:
            UnknownNormalisersError: The loss has several normalisers, and nothing is known of the rest of the batch.
        """
        normaliser, value = self._normaliser(loss, images), self._value(loss, images)
        if normaliser.ndim:
            return self._scaled_terms(loss, value, normaliser, images)
        if not self._parts and images == self._images:
            self._estimate = normaliser.clamp(min=self._floor)  # exact, as the factor below is 1
        elif not self._parts:  # also after a failure, as the failed part may have had another size
            # A power of two, so that scaling back at the end is exact.
            expected = (normaliser * (self._images / images)).clamp(min=max(self._floor, 1e-6))
            if self._per_image is not None:
                # A batch with a NaN must not break the next one.
                before = torch.nan_to_num(self._per_image, nan=0.0, posinf=0.0)
                expected = torch.maximum(expected, before.to(expected) * self._images)
            self._estimate = torch.exp2(torch.log2(expected).round())
        return value.sum() * (normaliser.clamp(min=self._floor) / self._estimate)

    def _scaled_terms(self, loss: Loss, value: Tensor, normaliser: Tensor, images: int) -> Tensor:
        if self.ahead is not None:
            factor = normaliser.clamp(min=self._floor) / self.ahead.normaliser()
            return (value * self.ahead._with_factors(factor)).sum()
        if images != self._images or self._is_shared:
            raise UnknownNormalisersError
        return (value if loss.factors is None else value * loss.factors(value.detach(), normaliser)).sum()

    def add(self, loss: Loss, images: int, new: gradients.Gradients | None = None, *, is_lent: bool = False) -> None:
        """Add a finished part.

        Args:
            loss: Loss of the part.
            images: Number of images in the part.
            new: Gradients of the part; None to add its loss alone.
            is_lent: True if the next part overwrites these gradients.
        """
        items = {name: item.detach() for name, item in loss.items.items()}
        value, normaliser = self._value(loss, images).detach(), self._normaliser(loss, images)
        if normaliser.ndim:
            self._factors = loss.factors
        elif loss.has_terms:
            items = {name: self._own_factors(loss, item).sum() for name, item in items.items()}
        if new is not None:  # after this, nothing is allocated
            self._gradients = gradients.add(self._gradients or [None] * len(new), new, is_lent=is_lent)
        self._parts.append(_Part(normaliser, value, items))

    def sum_over(self, ranks: Ranks, retry: Retry, *, is_padding: bool = False) -> None:
        """Sum loss, items and normaliser over all ranks. The caller sums the gradients.

        Args:
            ranks: Processes that share the batch; all of them call this.
            retry: Repeats local calculations in which an allocation failed, never a collective.
            is_padding: True if the parts added on this rank have weight zero.
        """
        if ranks.size == 1:
            return
        names = sorted(self._parts[0].items)  # the same order on all ranks
        sums = retry(lambda: self._sums(names, is_padding))
        ranks.sum(sums)
        self._sum = sums[0]
        loss, *rest = retry(lambda: self._quotients(sums[1:]))
        self._whole = loss, dict(zip(names, rest, strict=True))

    def _sums(self, names: Sequence[str], is_padding: bool) -> list[Tensor]:
        """Return this rank's sums: of normalisers, and of the numerators of the loss and of the items."""
        numerators = [torch.zeros_like(number, dtype=torch.float64) for number in _numbers(self._parts[0], names)]
        if is_padding:
            return [torch.zeros_like(self.unfloored()), *numerators]
        for part in self._parts:
            weight = part.normaliser.clamp(min=self._floor)
            torch._foreach_add_(numerators, [number * weight for number in _numbers(part, names)])
        return [self.unfloored(), *numerators]

    def _quotients(self, numerators: Sequence[Tensor]) -> list[Tensor]:
        dtype = self._parts[0].value.dtype
        return [(number / self.normaliser()).to(dtype) for number in numerators]

    def finished_gradients(self) -> gradients.Gradients:
        """Return the gradients of the batch's loss; with several ranks, this rank's terms of the sums."""
        assert self._gradients is not None
        if self._estimate is not None and (len(self._parts) > 1 or self._whole is not None):
            gradients.scale(self._gradients, self._estimate / self.normaliser())
        return self._gradients

    def has_gradient(self) -> list[bool]:
        """Return for each parameter whether it has a gradient from the parts that were added."""
        return [gradient is not None for gradient in self._gradients or ()]

    def loss(self) -> Tensor:
        """Return the loss of the batch, in the shape of `Loss.value`."""
        return self._with_factors(self._unfactored())

    def items(self) -> dict[str, Tensor]:
        """Return the items of the batch, see `Loss.items`."""
        items = self._unfactored_items()
        several = self._parts[0].normaliser.ndim > 0
        return {name: self._with_factors(item).sum() for name, item in items.items()} if several else items

    def as_part(self) -> Loss:
        """Return the loss of the batch as that of a part of a larger batch."""
        return Loss(self._unfactored(), self.unfloored(), self._unfactored_items(), factors=self._factors)

    def _unfactored_items(self) -> dict[str, Tensor]:
        if self._whole:
            return self._whole[1]
        return {name: self._combined([part.items[name] for part in self._parts]) for name in self._parts[0].items}

    def _unfactored(self) -> Tensor:
        return self._whole[0] if self._whole else self._combined([part.value for part in self._parts])

    def _with_factors(self, terms: Tensor) -> Tensor:
        return terms if self._factors is None else terms * self._factors(self._unfactored(), self.unfloored())

    def _combined(self, values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        weights = [part.normaliser.clamp(min=self._floor) / self.normaliser() for part in self._parts]
        weighted = [value * weight for value, weight in zip(values, weights, strict=True)]
        return sum(weighted, torch.zeros_like(values[0])).to(values[0].dtype)

    def normaliser(self) -> Tensor:
        """Return the normaliser of the batch, at least the floor."""
        return self.unfloored().clamp(min=self._floor)

    def unfloored(self) -> Tensor:
        """Return the normaliser of the batch before the floor."""
        return torch.stack([part.normaliser for part in self._parts]).sum(0) if self._sum is None else self._sum

    def _value(self, loss: Loss, images: int) -> Tensor:
        scales = loss.times_images and images != self._images
        value = loss.value * (self._images / images) if scales else loss.value
        return self._own_factors(loss, value) if loss.has_terms and not self._exact else value

    @staticmethod
    def _own_factors(loss: Loss, terms: Tensor) -> Tensor:
        """Multiply terms by their factors for the part alone."""
        if loss.factors is None:
            return terms
        assert isinstance(loss.normaliser, Tensor)
        return terms * loss.factors(loss.value.detach(), loss.normaliser)

    def _normaliser(self, loss: Loss, images: int) -> Tensor:
        if isinstance(loss.normaliser, Tensor) and (self._exact or not loss.has_terms):
            normaliser = loss.normaliser.detach().double()  # counts and half precision do not add up exactly
            return normaliser if loss.has_terms else normaliser.reshape(())
        number = images * max(self._floor, 1.0) if loss.has_terms else float(loss.normaliser)
        # It is filled on the device, as a copy from the host would wait for the device.
        return torch.full((), number, device=loss.value.device, dtype=torch.float64)


def _numbers(part: _Part, names: Sequence[str]) -> list[Tensor]:
    return [part.value, *(part.items[name] for name in names)]
