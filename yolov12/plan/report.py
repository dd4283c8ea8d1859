"""What `yolov12 plan` found out about a model: plain data, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass

from yolov12.mas.checkpointing.checkpointing import REBUILD, RECOMPUTE
from yolov12.mas.profiling.ladder import ladder_of
from yolov12.mas.profiling.profile import Profile
from yolov12.plan.arguments import Request
from yolov12.plan.choose import Choice, Wish, choose
from yolov12.plan.estimate import Fixed, fixed
from yolov12.plan.micro_batch import MicroBatch
from yolov12.plan.network import load
from yolov12.plan.roofline import Roofline

__all__ = ["Levers", "Report", "make_report"]

_USUAL_CARD = (312.0, 1555.0)  # an A100, where only memory is given: plans hardly depend on it


@dataclass(frozen=True)
class Levers:
    """Bytes that an image keeps for the backward pass."""

    kept_bytes: int
    """As it is."""
    rebuilt_bytes: int
    """With all BatchNorm and activation outputs rebuilt."""
    recomputed_bytes: int
    """With all layers recomputed."""


@dataclass(frozen=True)
class Report:
    """One model."""

    model: str
    imgsz: int
    batch: int
    boxes: int
    attention: str
    """Which kernel runs it."""
    fixed: Fixed
    half_weights_bytes: int
    levers: Levers
    choice: Choice
    budget_bytes: int
    total_bytes: int


def make_report(name: str, request: Request) -> Report:
    """Build a model in shapes, trace it and plan for it.

    Raises:
        ConfigError: It is no detection model, or an argument does not go with it.
    """
    network = load(name, request.classes)
    stride = max(network.strides)
    imgsz = -(-request.imgsz // stride) * stride  # as Ultralytics rounds it
    held = fixed(network, request.batch, request.optimizer)
    micro_batch = MicroBatch(network, imgsz, request.boxes, request.amp, request.config.disabled_layers)
    card = request.card
    profile = micro_batch.profile(Roofline(*(_USUAL_CARD if card is None else (card.teraflops, card.gigabytes_per_s))))
    wish = Wish(
        batch=request.batch,
        imgsz=imgsz,
        boxes=request.boxes,
        budget_bytes=request.budget_bytes,
        bn_group=request.config.bn_group,
        micro_batch=request.config.micro_batch,
    )
    return Report(
        model=name,
        imgsz=imgsz,
        batch=request.batch,
        boxes=request.boxes,
        attention=_attention(request),
        fixed=held,
        half_weights_bytes=micro_batch.half_weights_bytes,
        levers=_levers(micro_batch.lines().kept.bytes_per_image, profile),
        choice=choose(micro_batch, held, ladder_of(profile), wish, profile.total),
        budget_bytes=wish.budget_bytes,
        total_bytes=request.total_bytes,
    )


def _levers(kept_bytes: float, profile: Profile) -> Levers:
    stages = profile.stages()
    return Levers(
        kept_bytes=round(kept_bytes),
        rebuilt_bytes=round(kept_bytes - sum(stage.rebuild_frees_bytes for stage in stages)),
        recomputed_bytes=round(kept_bytes - sum(stage.recompute_frees_bytes for stage in stages)),
    )


def _attention(request: Request) -> str:
    if not request.amp:
        return "memory-efficient (flash needs half precision)"
    return (
        "flash from compute capability 8.0, else memory-efficient" if request.card is None else request.card.attention
    )


def modes_of(choice: Choice) -> dict[str, tuple[str, ...]]:
    """Layers by what is done with them."""
    return {mode: choice.estimate.plan.names(mode) for mode in (REBUILD, RECOMPUTE)}
