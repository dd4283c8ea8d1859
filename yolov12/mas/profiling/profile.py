"""What the layers of a model cost: bytes kept for the backward pass, bytes that come and go, milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerCost", "Profile", "Time"]


@dataclass(frozen=True)
class Time:
    """Milliseconds for an image. Few at once wait for the host that launches them, many for the device."""

    host_ms: float
    device_ms: float


@dataclass(frozen=True)
class LayerCost:
    """One layer, per image."""

    name: str
    inside: str | None
    """The layer that it is part of, if that is one of the profile's."""
    stage: int
    """Which of the outermost layers this is or is part of, in the order they run."""
    kept_bytes: float
    """Kept for the backward pass of anything, and made here."""
    recompute_frees_bytes: float
    """Less of it, if the layer is recomputed."""
    rebuild_frees_bytes: float
    """Less of it, if outputs of BatchNorm and activations are rebuilt."""
    recompute: Time
    """What recomputing costs."""
    rebuild: Time
    """What rebuilding costs."""


@dataclass(frozen=True)
class Profile:
    """Of a model, per image; what does not grow with images is left out."""

    layers: tuple[LayerCost, ...]
    """Outer ones before those inside."""
    loss_extra_bytes: float
    """Peak of the loss, above all that is kept by then."""
    stage_extra_bytes: tuple[float, ...]
    """Peak of the backward pass of each outermost layer, above all that is kept before and in it."""
    total: Time
    """Forward and backward pass of the whole model and loss, all kept."""

    def share_of_time(self, time: Time) -> float:
        """A time relative to the whole: between what it is where the host is waited for and where the device is."""
        return (time.host_ms / self.total.host_ms + time.device_ms / self.total.device_ms) / 2

    def stages(self) -> tuple[LayerCost, ...]:
        """The outermost layers."""
        return tuple(layer for layer in self.layers if layer.inside is None)
