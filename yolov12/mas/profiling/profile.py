"""The cost of a model's layers: bytes kept for the backward pass, bytes used temporarily, and milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerCost", "Profile", "Time"]


@dataclass(frozen=True)
class Time:
    """Milliseconds per image. Small batches are launch-bound (limited by the host), large batches by the device."""

    host_ms: float
    """Time per image if the host is the bottleneck."""
    device_ms: float
    """Time per image if the device is the bottleneck."""


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer, per image."""

    name: str
    """Name of the layer, such as `backbone.4.m.0`."""
    inside: str | None
    """Name of the enclosing layer in the profile; None for an outermost layer."""
    stage: int
    """Index of the outermost layer that this layer is or is part of, in the order in which they run."""
    kept_bytes: float
    """Bytes that this layer makes and that any layer keeps for its backward pass."""
    recompute_frees_bytes: float
    """Bytes of `kept_bytes` that recomputing the layer frees, minus the inputs that must be kept for it."""
    rebuild_frees_bytes: float
    """Bytes of `kept_bytes` that rebuilding outputs of BatchNorm and activations frees."""
    result_bytes: float
    """Bytes of `rebuild_frees_bytes` that are part of the model's result, which is in memory until the loss is known.
    Ultralytics' models return the feature maps that their head reads."""
    held_bytes: float
    """Bytes of `rebuild_frees_bytes` that are in memory until the forward pass ends: the code of the model refers to
    them. Ultralytics' models refer to the feature maps that a later layer reads."""
    largest_rebuilt_bytes: float
    """Bytes of the largest of the outputs that can be rebuilt. In the backward pass of the layer, one is in memory."""
    recompute: Time
    """Additional time if the layer is recomputed."""
    rebuild: Time
    """Additional time if outputs of BatchNorm and activations are rebuilt."""


@dataclass(frozen=True)
class Profile:
    """Cost of a model's layers and its loss, per image. Memory that does not depend on the images is left out."""

    layers: tuple[LayerCost, ...]
    """Costs of layers; outer layers come before the layers inside them."""
    forward_extra_bytes: float
    """Peak bytes of the forward pass, above everything that is kept when it ends."""
    loss_extra_bytes: float
    """Peak bytes of the loss, above everything that is kept when it runs."""
    stage_extra_bytes: tuple[float, ...]
    """Peak bytes of the backward pass of each outermost layer, above what this layer and the layers before it keep."""
    total: Time
    """Time of the forward and backward pass of the whole model and loss, with everything kept."""
    joined_bytes: float = 0.0
    """Bytes by which the peak without a checkpoint plan is lower than the layers tell: BatchNorm also adds residuals
    and writes concatenations, see `batchnorm.grouped.GroupedBatchNorm.joins`. Layers that a plan does not name do so,
    too, and its peak is lower by a part of these bytes, which is not counted."""

    def fraction_of_time(self, time: Time) -> float:
        """Return a time as a fraction of the total: the mean of the fractions of host time and of device time."""
        return (time.host_ms / self.total.host_ms + time.device_ms / self.total.device_ms) / 2

    def stages(self) -> tuple[LayerCost, ...]:
        """Return the costs of the outermost layers."""
        return tuple(layer for layer in self.layers if layer.inside is None)
