"""Statistics that BatchNorm layers write while they run in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.batchnorm.plain import momentum_of

__all__ = ["Statistics", "move_running_statistics"]


class Statistics:
    """Means and variances of groups: one row per group, with the channels of all layers side by side.

    Args:
        columns: Channels of each layer in a row.
        rows: Tensor of no rows, (0, channels of all layers), of the type and on the device of the statistics.
    """

    def __init__(self, columns: Sequence[slice], rows: Tensor) -> None:
        self._columns = columns
        self.means, self.variances = rows, rows.clone()
        self.views: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        """The same memory as one view per group and layer."""
        self.called: set[int] = set()
        """Indices of the layers that were called."""
        self.fused: set[int] = set()
        """Indices of the layers that ran in one operation with their activation."""

    def empty(self) -> Statistics:
        """Return statistics of the same layers without rows."""
        return Statistics(self._columns, self.means[:0])

    def clear(self) -> None:
        """Begin a batch."""
        # A momentum of 1 multiplies the old value by zero. Infinity or NaN would survive that.
        self.means.zero_()
        self.variances.zero_()
        self.called.clear()
        self.fused.clear()

    def reserve(self, rows: int) -> None:
        """Make room for a number of groups. The memory stays the same unless it has to grow."""
        if not self._columns or len(self.means) >= rows:
            return
        rows = max(rows, 2 * len(self.means))  # views are made anew, which takes long for many groups
        more = self.means.new_zeros(rows - len(self.means), self.means.shape[1])
        self.means, self.variances = torch.cat((self.means, more)), torch.cat((self.variances, more))
        self.views = [
            (self.by_layer(mean), self.by_layer(variance))
            for mean, variance in zip(self.means, self.variances, strict=True)
        ]

    def by_layer(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return each layer's part of rows of statistics, along the last dimension."""
        return tuple(rows[..., columns] for columns in self._columns)

    def of_layer(self, index: int, first: int, groups: int) -> list[Tensor]:
        """Return means and variances of a layer, (groups, channels) each, from a group on."""
        rows = slice(first, first + groups)
        return [each[rows, self._columns[index]] for each in (self.means, self.variances)]

    def adopt(self, others: Statistics, first: int) -> None:
        """Take over the statistics of other groups, as the rows from `first` on."""
        rows = slice(first, first + len(others.means))
        torch._foreach_copy_([self.means[rows], self.variances[rows]], [others.means, others.variances])
        self.called |= others.called
        self.fused |= others.fused

    def averages(self, groups: Sequence[int], images: int) -> list[Tensor]:
        """Return weighted sums of means and of variances, see `GroupedBatchNorm.averages`."""
        weights, rows = [size / images for size in groups], slice(len(groups))
        return [
            torch.stack(torch._foreach_mul(list(each[rows].unbind()), weights)).sum(0)
            for each in (self.means, self.variances)
        ]


def move_running_statistics(
    layers: Mapping[int, _BatchNorm], averages: Sequence[Sequence[Tensor]], groups: int
) -> None:
    """Move the running statistics of layers towards the statistics of a batch. A failed allocation changes nothing.

    Args:
        layers: Index → layer that was called in the batch.
        averages: Means and variances of the batch, of shape (channels,) at the index of each layer.
        groups: Number of groups in the batch.
    """
    called = [(index, layer) for index, layer in layers.items() if layer.training and layer.track_running_stats]
    counts = [layer.num_batches_tracked for _, layer in called if layer.num_batches_tracked is not None]
    kept = [(index, layer) for index, layer in called if layer.running_mean is not None]
    momenta = [momentum_of(layer, groups) for _, layer in kept]
    # An allocation may fail, and this runs again: so everything is allocated before anything is changed.
    moves = []
    for average in averages if kept else ():
        moves.append(torch._foreach_mul([average[index] for index, _ in kept], momenta))
    if counts:
        torch._foreach_add_(counts, groups)
    for name, move in zip(("running_mean", "running_var"), moves, strict=False):
        running: list[Tensor] = [getattr(layer, name) for _, layer in kept]
        torch._foreach_mul_(running, [1.0 - momentum for momentum in momenta])
        torch._foreach_add_(running, list(move))
