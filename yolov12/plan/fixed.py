"""Bytes that are there whatever the micro-batch: weights, gradients and libraries."""

from __future__ import annotations

from torch import nn

from yolov12.models.optimizer_state import tensors_bytes

__all__ = ["LIBRARY_BYTES", "NOMINAL_BATCH", "gradients_bytes", "weights_bytes"]

LIBRARY_BYTES = 32 * 2**20
"""cuBLAS' workspace in deterministic mode, which PyTorch takes from its own allocator."""

NOMINAL_BATCH = 64
"""Ultralytics' `nbs`: gradients of smaller batches are added up before the optimizer steps."""


def weights_bytes(model: nn.Module) -> int:
    """Parameters and buffers; the moving average of a training (EMA) is as large."""
    return tensors_bytes((*model.parameters(), *model.buffers()))


def gradients_bytes(model: nn.Module) -> int:
    """One gradient for every parameter that is trained."""
    return tensors_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
