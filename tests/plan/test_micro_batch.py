"""A micro-batch in shapes only, against a real one and against what was measured on a GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolov12.mas.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.models.layer_names import layer_names
from yolov12.plan import estimate, load
from yolov12.plan.estimate import fixed
from yolov12.plan.micro_batch import MicroBatch

MIB = 2**20


def every_layer(network, mode):
    return Plan(tuple((name, mode) for name in layer_names(network.model)))


def test_what_is_traced_in_shapes_is_what_a_real_pass_takes(network):
    real = DetectionModel("yolov12n.yaml", nc=7, verbose=False).train()
    real.model[-1].dfl.requires_grad_(False)
    real = SimpleNamespace(
        model=real.to(memory_format=torch.channels_last),
        mode=nullcontext(),
        criterion=network.criterion,
        strides=network.strides,
    )
    for plan in (KEEP_ALL, Plan((("backbone.2", REBUILD), ("neck.5", RECOMPUTE)))):
        fake_bytes, real_bytes = (MicroBatch(each, 64, boxes=5).trace(2, plan) for each in (network, real))
        # Real kernels differ from their shapes' rules in a few small tensors that they keep, such as statistics.
        assert fake_bytes == pytest.approx(real_bytes, rel=0.01)


def test_bytes_are_linear_in_images(micro_batch):
    lines = micro_batch.lines()
    kept_bytes, peak_bytes = micro_batch.trace(100)
    assert lines.kept(100) == pytest.approx(kept_bytes, rel=1e-3)  # but for blocks of 512 bytes
    assert lines.peak(100) == pytest.approx(peak_bytes, rel=1e-3)


def test_plans_keep_less(network, micro_batch):
    plans = KEEP_ALL, every_layer(network, REBUILD), every_layer(network, RECOMPUTE)
    keep, rebuild, recompute = (micro_batch.trace(8, plan) for plan in plans)
    assert recompute[0] < 0.8 * rebuild[0] < 0.6 * keep[0]
    assert recompute[1] < rebuild[1] < keep[1]


def test_weights_have_one_copy_in_half_precision(network, micro_batch):
    micro_batch.trace(2)
    cast = [part for part in network.model.modules() if isinstance(part, nn.Conv2d)]
    values = sum(part.weight.numel() for part in cast) - network.model.model[-1].dfl.conv.weight.numel()
    assert micro_batch.half_weights_bytes == pytest.approx(2 * values, rel=0.02)  # biases, and blocks of 512 bytes


def test_freezing_and_layout_are_those_of_a_training(network):
    frozen = [name for name, parameter in network.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.21.dfl.conv.weight"]


@pytest.mark.slow
def test_peaks_that_were_measured_in_trainings():
    """benchmarks/results/memory.json, `limits`: whole trainings with AdamW, rows with so many boxes in an image."""
    measured_mib = {
        (256, 16): 4633, (256, 32): 9038, (256, 64): 17851, (328, 16): 4790, (328, 32): 9352, (328, 64): 18479,
    }  # fmt: skip
    network = load("yolov12s.yaml", classes=7)
    held = fixed(network, 256, "AdamW")
    lines = {boxes: MicroBatch(network, 640, boxes).lines().peak for boxes in (256, 328)}
    for (boxes, images), mib in measured_mib.items():
        predicted = held.live_bytes + held.gradients_bytes + lines[boxes](images)
        assert predicted / MIB == pytest.approx(mib, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mib_per_image"), [("yolo12s.yaml", 254), ("yolo12n.yaml", 145)])
def test_bytes_of_an_image_that_were_measured(model, mib_per_image):
    """On an H100, with 64 images, of the network and the loss."""
    one = estimate(model, micro_batch=64, boxes=50)
    assert one.micro_batch_bytes / 64 / MIB == pytest.approx(mib_per_image, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rebuilt", "recomputed", "freed_mib"),
    [
        (
            "yolov12n.yaml",
            "backbone.1 backbone.3 backbone.4 backbone.5 backbone.6.m.1.1 backbone.7 backbone.8 neck.2 neck.5 neck.6 "
            "neck.8 neck.9 neck.11 head",
            "backbone.0 backbone.2 backbone.6.m.0 backbone.6.m.1.0",
            2386,
        ),
        (
            "yolov12s.yaml",
            "backbone.0 backbone.1 backbone.3 backbone.4.cv1 backbone.4.cv2 backbone.5 backbone.7 backbone.8 neck.2 "
            "neck.5 head.cv2.0 head.cv3.0.0 head.cv3.0.1 head.cv3.1",
            "backbone.2 backbone.4.m.0 backbone.6 neck.6 neck.8 neck.9",
            4722,
        ),
    ],
)
def test_what_plans_were_measured_to_free_at_the_peak(model, rebuilt, recomputed, freed_mib):
    """On an H100, 32 images at 640 (benchmarks/checkpointing.py, `freed`)."""
    modes = [(name, REBUILD) for name in rebuilt.split()] + [(name, RECOMPUTE) for name in recomputed.split()]
    micro_batch = MicroBatch(load(model), 640, boxes=49)
    freed_bytes = micro_batch.trace(32)[1] - micro_batch.trace(32, Plan(tuple(modes)))[1]
    assert freed_bytes / MIB == pytest.approx(freed_mib, rel=0.005)
