"""Parameters and BatchNorm layers that a batch reaches on some ranks only, such as experts and layers that are dropped.

One process gives a parameter a gradient if any part of the batch reached it. Several ranks have to give it one on all
of them. Otherwise their optimizers would do different things, and the flat buffers in which gradients are summed would
not be aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn

from yolov12.mas.distributed.ranks import Ranks, RankStatus

__all__ = ["Reached"]

_DIGEST_BYTES = 6
"""Ranks exchange numbers in double precision, which holds integers of 53 bits."""


class Reached:
    """Parameters and layers that a rank's share has reached, and later those that the batch has reached on any rank.

    Args:
        has_gradient: For each parameter, whether it has a gradient.
        was_called: For each BatchNorm layer, whether it was called.
        is_padding: True for a share of weight zero, which reaches nothing.
    """

    def __init__(self, has_gradient: Sequence[bool], was_called: Sequence[bool], *, is_padding: bool = False) -> None:
        flags = bytes((*has_gradient, *was_called))
        self._flags = bytes(len(flags)) if is_padding else flags
        self._parameters = len(has_gradient)

    @property
    def digest(self) -> int:
        """Number of 48 bits, which is equal on two ranks if their shares have reached the same."""
        return int.from_bytes(blake2b(self._flags, digest_size=_DIGEST_BYTES).digest(), "little")

    @property
    def called(self) -> list[int]:
        """Indices of the BatchNorm layers that were called, in order."""
        return [index for index, flag in enumerate(self._flags[self._parameters :]) if flag]

    def join(self, ranks: Ranks, statuses: Sequence[RankStatus]) -> None:
        """Add what other ranks have reached. This is a collective only if ranks have reached different things.

        Args:
            ranks: Processes that share the batch.
            statuses: Reports of all ranks on this batch, with their digests.
        """
        if len({status.reached for status in statuses}) > 1:
            self._flags = bytes(ranks.any(list(self._flags)))

    def completed(self, gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """Return gradients for the parameters that were reached, and None for all others.

        Args:
            gradients: Gradients of this rank's share.
            parameters: The parameters.

        Returns:
            The same tensors, with zeros for a parameter that was reached on other ranks only.
        """
        return [
            None if not flag else torch.zeros_like(parameter) if gradient is None else gradient
            for flag, gradient, parameter in zip(self._flags[: self._parameters], gradients, parameters, strict=True)
        ]
