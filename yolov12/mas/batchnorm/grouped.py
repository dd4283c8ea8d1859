"""Batch normalisation in groups of fixed size: the result does not depend on how a batch is split into micro-batches.

BatchNorm makes the images that it normalises together depend on each other, so another split of a batch gives another
gradient. Here every image is normalised with the images of its group, whatever else is in its micro-batch, and every
micro-batch consists of whole groups. Training on several GPUs without synchronised BatchNorm does the same: there, the
images of one GPU are a group. On one GPU the method is known as "ghost batch normalization" (Hoffer, Hubara, Soudry,
2017, https://arxiv.org/abs/1705.08741).

Running statistics move as far as PyTorch's in a pass for each group: they move once for each group, always by the mean
over all groups, so the order of groups and the ranks that run them make no difference. `num_batches_tracked` counts
groups. Each group writes its statistics to its own row. A group that runs again (after a failure, or because it is
recomputed) therefore overwrites its statistics and adds nothing.

Users may switch layers at any time: mode, momentum, running statistics, parameters, or the layer itself. What holds is
read when a batch begins, and means what it means in PyTorch. Only a layer whose forward pass is not PyTorch's own
cannot run in groups (ungrouped.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.batchnorm import fused as fused_kernels
from yolov12.mas.batchnorm.joined import Join, Slot, adds_up
from yolov12.mas.batchnorm.pairs import Pairs
from yolov12.mas.batchnorm.plain import normalize, normalize_again
from yolov12.mas.batchnorm.protocol import Again, Kernels
from yolov12.mas.batchnorm.statistics import Statistics, move_running_statistics
from yolov12.mas.batchnorm.ungrouped import UngroupedBatchNorm, is_plain
from yolov12.mas.modules import has_global_hooks, has_hooks, overridden

__all__ = ["GroupedBatchNorm", "Kernels"]

# Each layer's part of a row starts at a multiple of this many values, so at a multiple of 16 bytes. At other addresses
# cuDNN's BatchNorm fails ("misaligned address"), after a layer of 51 channels for example.
_ALIGNED = 4


class GroupedBatchNorm:
    """Runs the BatchNorm layers of a model in groups, as far as they normalise with the statistics of a batch.

    The model is changed only inside `within`. At any other time it can be copied, saved and evaluated.

    A layer that is called several times in a forward pass keeps the statistics of its last call. A layer that is not
    called in some micro-batch, on this rank or another, counts there as if it had seen zeros.

    Args:
        model: Model that contains the layers.
        activations: BatchNorm → activation that is applied to its output. Nothing else may use that output. If the
            kernels support it, BatchNorm and SiLU then run as one operation.
        kernels: Implementation for several groups at once; by default the Triton kernels for CUDA.
        log: Called with a line for the user about layers that do not run in groups.
    """

    def __init__(
        self,
        model: nn.Module,
        activations: Mapping[nn.Module, nn.Module] | None = None,
        kernels: Kernels = fused_kernels,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._model, self._kernels = model, kernels
        self._into: Any = getattr(kernels, "batch_norm_into", None)
        self._writes_into: Callable[[torch.device], bool] = getattr(kernels, "writes_into", lambda device: False)
        self._pairs = Pairs(activations or {})
        self._activations: dict[nn.Module, nn.Module] = {}
        self.joins = self.may_join = False
        """Whether layers may add a residual to their output, and write it to a concatenation, see `joined`: `joins` in
        this moment, `may_join` in this batch wherever they do not run `apart`."""
        self._activated: Tensor | None = None  # BatchNorm output that is already activated
        self._all: list[_BatchNorm] = []
        self.find_layers()
        self._ungrouped = UngroupedBatchNorm(model, log)
        self._layers: list[_BatchNorm] = []
        self._forwards: list[_Forward] = []
        self._statistics = Statistics((), torch.empty(0, 0))
        self._groups: Sequence[int] = ()
        self._first = 0
        self.listener: Callable[[nn.Module, Tensor, Tensor, Again], None] | None = None
        """Is called with each layer, its output, its input, and a function that computes the output again."""

    @property
    def fused(self) -> int:
        """Number of layers that ran in one operation with their activation in this batch."""
        return len(self._statistics.fused)

    @property
    def layers(self) -> Sequence[_BatchNorm]:
        """Layers that run in groups in this batch."""
        return self._layers

    @property
    def was_called(self) -> Sequence[bool]:
        """For each of `layers`, whether it was called in this batch, on this rank."""
        return [index in self._statistics.called for index in range(len(self._layers))]

    @property
    def ungrouped(self) -> Sequence[_BatchNorm]:
        """Layers that do not run in groups in this batch."""
        return self._ungrouped.layers

    def find_layers(self) -> None:
        """Look for the layers again, as modules of the model were replaced."""
        self._modules = list(self._model.modules())
        self._pairs.find(self._modules)
        self._all = [layer for layer in self._modules if isinstance(layer, _BatchNorm)]

    def begin(self) -> None:
        """Start a batch: read how the layers are switched, and clear the statistics of the previous batch."""
        self._activations = self._pairs.unwatched()
        in_use = [layer for layer in self._all if layer.training or layer.running_mean is None]
        layers = [layer for layer in in_use if is_plain(layer)]
        self._ungrouped.begin([layer for layer in in_use if not is_plain(layer)])
        if layers != self._layers:
            self._forwards = [_Forward(self, index, layer) for index, layer in enumerate(layers)]
            widths = [-(-layer.num_features // _ALIGNED) * _ALIGNED for layer in layers]
            starts = [end - width for end, width in zip(accumulate(widths), widths, strict=True)]
            columns = [slice(at, at + layer.num_features) for at, layer in zip(starts, layers, strict=True)]
            own = [each for layer in layers for each in (layer.running_mean, layer.weight) if each is not None]
            like = next(iter([*own, *self._model.parameters()]), torch.empty(0))
            self._statistics = Statistics(columns, like.new_zeros(0, sum(widths)))
            self._layers = layers  # only now, as an allocation may have failed
        self._statistics.clear()
        has_any_hooks = has_global_hooks() or any(map(has_hooks, self._modules))
        self.may_join = self._writes_into(self._statistics.means.device) and not has_any_hooks

    @contextmanager
    def within(self, groups: Sequence[int], first: int) -> Iterator[None]:
        """Give the layers their grouped forward pass while one micro-batch runs forward and backward.

        If several models share an activation module, it is changed for all of them meanwhile.

        Args:
            groups: Images in each group of this micro-batch.
            first: Number of groups of the batch that come before this micro-batch.

        Raises:
            RuntimeError: An activation was not applied to the output of its BatchNorm, or a layer got a number of
                images that is not a multiple of the micro-batch's.
        """
        self._groups, self._first, self.joins = groups, first, self.may_join
        self._statistics.reserve(first + len(groups))
        forwards: dict[nn.Module, Callable[..., Tensor]] = dict(zip(self._layers, self._forwards, strict=True))
        for activation in {*self._activations.values()}:
            forwards[activation] = partial(self._activate, activation.forward)
        try:
            with self._ungrouped.within(), overridden(forwards):
                yield
                self._check_activated()
        finally:
            self._activated = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the layers that run in this context, inside `within`, neither add residuals nor write concatenations."""
        joins, self.joins = self.joins, False
        try:
            yield
        finally:
            self.joins = joins

    def drafts(self) -> Statistics:
        """Return empty statistics for `aside`."""
        return self._statistics.empty()

    @contextmanager
    def aside(self, drafts: Statistics) -> Iterator[None]:
        """Write the statistics of passes in this context to drafts, and leave those of the batch as they are.

        Args:
            drafts: Receives the statistics. Its memory stays the same from the second pass on.
        """
        own = self._statistics, self._groups, self._first
        self._statistics = drafts
        try:
            yield
        finally:
            self._statistics, self._groups, self._first = own

    def adopt(self, drafts: Statistics, first: int) -> None:
        """Take the statistics of drafts for those of a micro-batch, see `within`, whose groups the drafts have.

        Args:
            drafts: Statistics of the latest pass.
            first: Number of groups of the batch that come before the micro-batch.
        """
        self._statistics.adopt(drafts, first)

    def averages(self, groups: Sequence[int], images: int) -> list[Tensor]:
        """Return this rank's contribution to the batch's statistics, to be summed over all ranks.

        Args:
            groups: Images in each group of this rank. A group's statistics are weighted by its number of images.
            images: Images in the whole batch, over all ranks.

        Returns:
            Weighted sums of means and of variances, each of shape (channels of all layers, each number
            padded to a multiple of four,); empty without layers.
        """
        return self._statistics.averages(groups, images) if self._layers else []

    def commit(self, averages: Sequence[Tensor], groups: int, called: Collection[int] | None = None) -> None:
        """Finish a batch: update the running statistics.

        Args:
            averages: What `averages` returned, summed over all ranks.
            groups: Number of groups in the batch, over all ranks.
            called: Indices of the layers that were called, over all ranks; None for those that were called here.
        """
        layers = {index: self._layers[index] for index in sorted(self._statistics.called if called is None else called)}
        move_running_statistics(layers, [self._statistics.by_layer(average) for average in averages], groups)
        self._ungrouped.commit()

    def joined(
        self,
        index: int,
        layer: _BatchNorm,
        x: Tensor,
        silu: bool,
        residual: Tensor | None,
        join: Join | Slot | None,
        first: int | None,
    ) -> Tensor | None:
        """Run a layer and its activation, add a residual, and write the result to a concatenation.

        Args:
            index: Index of the layer.
            layer: The layer.
            x: Its input.
            silu: Whether SiLU follows the layer.
            residual: Tensor to add; None for none.
            join: Concatenation whose next part is the result; None for none.
            first: First channel that has other uses than the concatenation; None if there are none.

        Returns:
            The channels from `first` on, or all of them; None if the kernels do not support this call.
        """
        if not self.joins or silu > (layer in self._activations):
            return None
        self._check_activated()
        sizes = self._sizes(layer, x)
        if not self._suits_kernels(layer, x, sizes) or (residual is not None and not adds_up(x, residual)):
            return None
        self._statistics.called.add(index)
        if silu:
            self._statistics.fused.add(index)
        means, variances = self._statistics.of_layer(index, self._first, len(self._groups))
        part = join.place(x.shape, x) if join is not None else None
        out, tail = self._into(
            x, layer.weight, layer.bias, means, variances, sizes, layer.eps, silu, residual, part,
            first if part is not None else None,
        )  # fmt: skip
        if join is not None:
            join.add(out, in_place=part is not None, copy=tail)
        result: Tensor = tail if tail is not None else out[:, first:] if first else out
        return result

    def _forward(self, index: int, layer: _BatchNorm, x: Tensor) -> Tensor:
        self._check_activated()
        layer._check_input_dim(x)
        self._statistics.called.add(index)
        sizes = self._sizes(layer, x)
        fused = layer in self._activations
        again: Again
        if (fused or len(sizes) > 1) and self._suits_kernels(layer, x, sizes):
            weight, bias = layer.weight, layer.bias
            means, variances = self._statistics.of_layer(index, self._first, len(self._groups))
            out, again = self._kernels.batch_norm(x, weight, bias, means, variances, sizes, layer.eps, fused)
            if fused:
                self._activated = out
                self._statistics.fused.add(index)
        else:
            views = self._statistics.views[self._first : self._first + len(sizes)]
            statistics = [(means_of[index], variances_of[index]) for means_of, variances_of in views]
            parts = [x] if len(sizes) == 1 else x.split(sizes)
            outs = [normalize(part, layer, *rows) for part, rows in zip(parts, statistics, strict=True)]
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
            again = partial(normalize_again, layer, sizes, statistics)
        if self.listener is not None:
            self.listener(layer, out, x, again)
        return out

    def _sizes(self, layer: _BatchNorm, x: Tensor) -> list[int]:
        """Return the images in each group as this layer sees them.

        A layer may see several entries per image, one after the other (crops of an image, for example).
        """
        if len(self._groups) == 1:
            return [len(x)]
        fold, rest = divmod(len(x), sum(self._groups))
        if rest or not fold:
            raise RuntimeError(
                f"{layer} was given {len(x)} images in a micro-batch of {sum(self._groups)}, which leaves open which "
                "its groups are. Use bn_group=0"
            )
        return [size * fold for size in self._groups]

    def _suits_kernels(self, layer: _BatchNorm, x: Tensor, sizes: Sequence[int]) -> bool:
        """Return whether the kernels can run this call. Invalid calls go to PyTorch, which raises its usual error."""
        return (
            layer.weight is not None
            and layer.bias is not None
            and self._kernels.applies(x, layer.weight, self._statistics.means)
            and x.shape[1] == layer.num_features
            and min(sizes) * x.shape[2] * x.shape[3] > 1
        )

    def forget_activated(self) -> None:
        """Do not expect an activation after the last BatchNorm: a recomputed layer may end with it."""
        self._activated = None

    def _activate(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if x is self._activated:
            self._activated = None
            return x
        return forward(x)

    def _check_activated(self) -> None:
        if self._activated is not None:
            raise RuntimeError("an activation was not applied to the output of the BatchNorm that it is said to follow")


class _Forward:
    """Forward pass of a layer in groups. Blocks ask it whether it can do more than that, see `joined`."""

    def __init__(self, norms: GroupedBatchNorm, index: int, layer: _BatchNorm) -> None:
        self._norms = norms
        self._forward, self.joined = partial(norms._forward, index, layer), partial(norms.joined, index, layer)

    @property
    def joins(self) -> bool:
        """True if `joined` may run the layer, see `GroupedBatchNorm.joins`."""
        return self._norms.joins

    def __call__(self, x: Tensor) -> Tensor:
        return self._forward(x)
