"""Plans a training of one model, and holds the result as data."""

from __future__ import annotations

from dataclasses import dataclass

from yolov12.mas.checkpointing.checkpointing import REBUILD, RECOMPUTE
from yolov12.mas.profiling.ladder import ladder_of
from yolov12.mas.profiling.profile import Profile
from yolov12.plan.arguments import Request
from yolov12.plan.choose import Choice, Requirements, choose
from yolov12.plan.estimate import FixedMemory, fixed_memory
from yolov12.plan.fake_model import load
from yolov12.plan.micro_batch import MicroBatchTracer
from yolov12.plan.roofline import Roofline

__all__ = ["ActivationBytes", "Report", "make_report"]

_USUAL_CARD = (312.0, 1555.0)  # an A100, if only memory is given: the plan hardly depends on the GPU


@dataclass(frozen=True)
class ActivationBytes:
    """Activation bytes that one image keeps for the backward pass."""

    kept_bytes: int
    """Without checkpointing."""
    rebuilt_bytes: int
    """With the outputs of all BatchNorm and activation modules rebuilt."""
    recomputed_bytes: int
    """With all layers recomputed."""


@dataclass(frozen=True)
class Report:
    """Plan of one model."""

    model: str
    imgsz: int
    batch: int
    boxes: int
    attention: str
    """Kernel of the attention."""
    fixed: FixedMemory
    half_weights_bytes: int
    """Copies of weights in half precision, which autocast keeps."""
    levers: ActivationBytes
    choice: Choice
    budget_bytes: int
    total_bytes: int


def make_report(name: str, request: Request) -> Report:
    """Plan a training without a GPU: build a fake model, trace its memory, and choose micro-batch and plan.

    Args:
        name: A model yaml or a weight file.
        request: The arguments of the plan.

    Returns:
        The plan, memory in bytes.

    Raises:
        ConfigError: The model is not a detection model, or an argument is not valid for it.
    """
    fake_model = load(name, request.classes)
    stride = max(fake_model.strides)
    imgsz = -(-request.imgsz // stride) * stride  # rounded up, as Ultralytics does
    fixed = fixed_memory(fake_model, request.batch, request.optimizer)
    tracer = MicroBatchTracer(fake_model, imgsz, request.boxes, request.amp, request.config.disabled_layers)
    card = request.card
    profile = tracer.profile(Roofline(*(_USUAL_CARD if card is None else (card.teraflops, card.gigabytes_per_s))))
    requirements = Requirements(
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
        fixed=fixed,
        half_weights_bytes=tracer.half_weights_bytes,
        levers=_activation_bytes(tracer.linear_bytes().kept.bytes_per_image, profile),
        choice=choose(tracer, fixed, ladder_of(profile), requirements, profile.total),
        budget_bytes=requirements.budget_bytes,
        total_bytes=request.total_bytes,
    )


def _activation_bytes(kept_bytes: float, profile: Profile) -> ActivationBytes:
    stages = profile.stages()
    return ActivationBytes(
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
    """Return mode → names of the layers that run in this mode, for the chosen checkpoint plan."""
    return {mode: choice.estimate.plan.names(mode) for mode in (REBUILD, RECOMPUTE)}
