"""Bytes that do not depend on the micro-batch: weights, gradients and libraries."""

from __future__ import annotations

from torch import nn

from yolov12.models.optimizer_state import tensors_bytes

__all__ = ["LIBRARY_BYTES", "NOMINAL_BATCH", "gradients_bytes", "weights_bytes"]

LIBRARY_BYTES = 32 * 2**20
"""The cuBLAS workspace in deterministic mode, which PyTorch allocates with its own allocator."""

NOMINAL_BATCH = 64
"""Default of `nbs`. Ultralytics accumulates the gradients of smaller batches before an optimizer step."""


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers. The moving average (EMA) of a training has the same size."""
    return tensors_bytes((*model.parameters(), *model.buffers()))


def gradients_bytes(model: nn.Module) -> int:
    """Return the bytes of one gradient for each trained parameter."""
    return tensors_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
