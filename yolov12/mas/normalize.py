"""Batch normalisation in groups of fixed size, so that cutting a batch into micro-batches cannot change its result.

BatchNorm ties together the images it normalises: cut a batch otherwise, and the gradient is another one. Here every image
is normalised with the images of its group, whatever shares its micro-batch, and micro-batches are made of whole groups.
Several GPUs without synchronised BatchNorm do the same (a share each), and "ghost batch normalization" is this on one
(Hoffer, Hubara, Soudry, 2017, https://arxiv.org/abs/1705.08741).

Running statistics move once a batch, by the mean over its groups, as `num_batches_tracked` says. Each group leaves its
statistics in a row of its own, so doing a group again (after a failure, or to recompute it) overwrites and does not add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["GroupedBatchNorm", "cut"]


def cut(images: int, group: int) -> tuple[int, ...]:
    """Sizes of the groups a batch is cut into: as few as possible of at most `group` images, as equal as possible.

    A batch that is no multiple of `group` so has no last group of one or two images, whose statistics would be noise.
    `group=0` is one group.
    """
    count = -(-images // group) if group else 1
    return tuple(images * (i + 1) // count - images * i // count for i in range(count))


class GroupedBatchNorm:
    """The BatchNorm layers of a model that are in training mode and keep running statistics.

    The model is changed only inside `within`: it can be copied, saved and evaluated at any other time. A layer that is called
    more than once in a forward pass keeps the statistics of its last call.

    Raises:
        ValueError: A layer has `momentum=None` (a cumulative average), which has no meaning here.
    """

    def __init__(self, model: nn.Module) -> None:
        # Synchronised layers already see every image there is.
        self._all = [
            layer
            for layer in model.modules()
            if isinstance(layer, _BatchNorm) and layer.track_running_stats and not isinstance(layer, nn.SyncBatchNorm)
        ]
        if any(layer.momentum is None for layer in self._all):
            raise ValueError("BatchNorm with momentum=None cannot be split into groups: give it a momentum")
        self._layers: list[_BatchNorm] = []
        self._rows: list[_Row] = []
        self._called: set[int] = set()

    def begin(self) -> None:
        """Start a batch: forget what the groups of the one before left."""
        layers = [layer for layer in self._all if layer.training]
        if layers != self._layers:
            self._layers, self._rows = layers, []
        for row in self._rows:  # a value that is overwritten is multiplied by zero, and an overflow would survive that
            row.mean.zero_()
            row.variance.zero_()
        self._called.clear()

    @contextmanager
    def within(self, groups: Sequence[int], first: int) -> Iterator[None]:
        """Run the model on one micro-batch, forward and backward.

        Args:
            groups: Images in each group of this micro-batch.
            first: Number of groups of the batch before it.
        """
        while self._layers and len(self._rows) < first + len(groups):
            self._rows.append(_Row(self._layers))
        rows = self._rows[first : first + len(groups)]
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._forward, index, groups, rows)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def commit(self, groups: Sequence[int]) -> None:
        """Finish a batch: move the running statistics.

        Args:
            groups: Images in each group of the whole batch, by which their statistics are weighted.
        """
        if not self._called:
            return
        called = sorted(self._called)
        layers = [self._layers[index] for index in called]
        momenta = [float(layer.momentum or 0.0) for layer in layers]
        weights = [size / sum(groups) for size in groups]
        rows = self._rows[: len(groups)]
        for name, new in (
            ("running_mean", [row.mean for row in rows]),
            ("running_var", [row.variance for row in rows]),
        ):
            running: list[Tensor] = [getattr(layer, name) for layer in layers]
            torch._foreach_mul_(new, weights)
            mean = torch.stack(new).sum(0).split([layer.num_features for layer in self._layers])
            torch._foreach_mul_(running, [1.0 - momentum for momentum in momenta])
            torch._foreach_add_(running, list(torch._foreach_mul([mean[index] for index in called], momenta)))
        counts: list[Tensor] = [getattr(layer, "num_batches_tracked") for layer in layers]
        torch._foreach_add_(counts, 1)

    def _forward(self, index: int, groups: Sequence[int], rows: Sequence[_Row], x: Tensor) -> Tensor:
        self._called.add(index)
        layer = self._layers[index]
        fold = len(x) // sum(groups)  # a layer may be given an image as several, one after the other
        parts = x.split([size * fold for size in groups]) if len(groups) > 1 else (x,)
        done = [
            F.batch_norm(part, row.means[index], row.variances[index], layer.weight, layer.bias, True, 1.0, layer.eps)
            for part, row in zip(parts, rows, strict=True)
        ]
        return torch.cat(done) if len(done) > 1 else done[0]


class _Row:
    """Statistics of one group in every layer: one tensor each, seen as one a layer."""

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        like = layers[0].running_mean
        assert like is not None
        sizes = [layer.num_features for layer in layers]
        self.mean, self.variance = like.new_zeros(sum(sizes)), like.new_zeros(sum(sizes))
        self.means, self.variances = self.mean.split(sizes), self.variance.split(sizes)
