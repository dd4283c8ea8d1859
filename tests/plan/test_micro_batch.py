"""A micro-batch in shapes only, against a real one and against what was measured on a GPU."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.models.layer_names import layer_names
from yolov12.plan.estimate import estimate
from yolov12.plan.micro_batch import MicroBatch
from yolov12.plan.network import load

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


MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks/results/checkpointing.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in MEASURED if part.startswith("ours-")])
def test_peaks_that_were_measured_on_a_card(part):
    """By benchmarks/checkpointing.py: the engine at several limits, under plans or none."""
    network = load(f"yolo12{part[-1]}.yaml")
    assert len(MEASURED[part]) >= 3
    for row in MEASURED[part]:
        plan = Plan(tuple((name, mode) for mode, names in row["plan"].items() for name in names))
        found = estimate(network, micro_batch=row["micro_batch"], plan=plan, boxes=49, optimizer="SGD")
        assert found.peak_bytes / MIB == pytest.approx(row["peak_mib"], rel=0.03)
