"""What grouped BatchNorm asks of kernels that normalise several groups in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Again", "Kernels"]

Again = Callable[[Tensor], Tensor]
"""Function that computes the output of a BatchNorm again from its input."""


class Kernels(Protocol):
    """Functions that normalise several groups in one call and can apply SiLU, such as `batchnorm.fused`.

    If they have functions `batch_norm_into` and `writes_into` like `batchnorm.fused`, residuals and concatenations are
    theirs, too.
    """

    def applies(self, x: Tensor, weight: Tensor, means: Tensor) -> bool:
        """Return whether the kernels support these tensors; see `batchnorm.fused.applies`."""

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        means: Tensor,
        variances: Tensor,
        sizes: Sequence[int],
        eps: float,
        silu: bool = False,
    ) -> tuple[Tensor, Again]:
        """Normalise the groups; see `batchnorm.fused.batch_norm`."""
