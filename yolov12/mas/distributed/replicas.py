"""Models that stay alike on all ranks.

All ranks compute the same parameters and the same running statistics of BatchNorm. They compare a small checksum of
them, to notice a fault of a machine. All other buffers are the user's: a layer may write to them what it sees of the
rank's own share, as InstanceNorm does, so they are copied from rank 0, which also validates and saves.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.mas.distributed.ranks import Ranks

__all__ = ["checksum", "keep_alike"]

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_alike(model: nn.Module, norms: Iterable[_BatchNorm], ranks: Ranks) -> int:
    """Copy from rank 0 what may differ between ranks. All ranks call this together.

    Args:
        model: Model of this rank.
        norms: BatchNorm layers whose running statistics are those of all ranks.
        ranks: Processes that share each batch.

    Returns:
        Checksum of the rest, for the next report to the other ranks; 0 if the rest was copied, too, as different
        devices may round differently.
    """
    of_norms = [each for norm in norms for each in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    alike = [*model.parameters(), *(buffer for buffer in of_norms if buffer is not None)]
    known = {id(tensor) for tensor in alike}
    _copy_from_first({name: buffer for name, buffer in model.named_buffers() if id(buffer) not in known}, ranks)
    if ranks.alike:
        return checksum(alike)
    ranks.copy_from_first([tensor.detach() for tensor in alike])
    return 0


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a checksum of all bits of tensors, never 0. The call waits for the device.

    The bits are added up tensor by tensor, which needs no additional memory. Differences inside one tensor could cancel
    each other, but only by chance.
    """
    sums = [_bits(tensor.detach()).sum(dtype=torch.int64) for tensor in tensors]
    return zlib.crc32(torch.stack(sums).cpu().numpy().tobytes()) or 1


@torch.no_grad()
def _copy_from_first(buffers: dict[str, Tensor], ranks: Ranks) -> None:
    """Give buffers what they hold on rank 0, through the host: their types and shapes may be any, and may differ."""
    own = {name: buffer.to("cpu", copy=True) for name, buffer in buffers.items()}  # a view would bring its whole tensor
    for name, value in ranks.from_first(own).items():
        if name not in own or torch.equal(own[name], value):
            continue
        if own[name].shape == value.shape:
            buffers[name].copy_(value)
        else:  # as in a layer that collects
            buffers[name].data = value.to(buffers[name])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_WHOLE[tensor.element_size()])
