"""Normalisation of groups by PyTorch's own BatchNorm, where kernels for several groups do not apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["momentum_of", "normalize", "normalize_again"]


def normalize(x: Tensor, layer: _BatchNorm, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalise one group. A momentum of 1 writes the statistics of `x` to `mean` and `variance`.

    Args:
        x: Images of the group.
        layer: BatchNorm layer.
        mean: (channels,), overwritten.
        variance: (channels,), overwritten with the unbiased variance.
    """
    out = F.batch_norm(x, mean, variance, layer.weight, layer.bias, True, 1.0, layer.eps)
    if len(x) == 1 and not x.is_cuda and out.requires_grad:
        # On the CPU, PyTorch 2.3 reads the gradient of a single image with the strides of its input. The result is
        # wrong, and no error is raised. A contiguous gradient avoids this.
        out.register_hook(Tensor.contiguous)
    return out


def normalize_again(
    layer: _BatchNorm, sizes: Sequence[int], statistics: Sequence[tuple[Tensor, Tensor]], x: Tensor
) -> Tensor:
    """Compute the output of all groups again, from the statistics that `normalize` stored.

    Args:
        layer: BatchNorm layer.
        sizes: Images in each group.
        statistics: Mean and unbiased variance of each group.
        x: Images of all groups.
    """
    if len(sizes) == 1:
        return _with_statistics(x, layer, *statistics[0])
    out = torch.empty_like(x)
    for part, into, (mean, variance) in zip(x.split(sizes), out.split(sizes), statistics, strict=True):
        into.copy_(_with_statistics(part, layer, mean, variance))
    return out


def _with_statistics(x: Tensor, layer: _BatchNorm, mean: Tensor, variance: Tensor) -> Tensor:
    values = x.numel() // x.shape[1]
    biased = variance * ((values - 1) / values)
    return F.batch_norm(x, mean, biased, layer.weight, layer.bias, False, 0.0, layer.eps)


def momentum_of(layer: _BatchNorm, groups: int) -> float:
    """Return the weight of groups that are not counted yet; without a momentum, all groups weigh the same.

    Args:
        layer: BatchNorm layer.
        groups: Number of groups.
    """
    if layer.momentum is not None:
        momentum = float(layer.momentum)
        return momentum if groups == 1 else 1.0 - (1.0 - momentum) ** groups  # of one group, to the last bit
    return 0.0 if layer.num_batches_tracked is None else groups / (float(layer.num_batches_tracked) + groups)
