"""The traced memory of fake micro-batches, compared with real micro-batches and with peaks measured on a GPU."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolov12.errors import ConfigError
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.scheduling.peak_model import Level
from yolov12.models import detection_loss
from yolov12.models.layer_names import layer_names
from yolov12.plan import cuda_rules, loss_bytes
from yolov12.plan.estimate import estimate
from yolov12.plan.fake_model import load
from yolov12.plan.micro_batch import MicroBatchTracer
from yolov12.plan.roofline import Roofline

MIB = 2**20


def every_layer(fake_model, mode):
    return Plan(tuple((name, mode) for name in layer_names(fake_model.model)))


def test_a_fake_micro_batch_takes_the_memory_of_a_real_one(fake_model):
    real = DetectionModel("yolov12n.yaml", nc=7, verbose=False).train()
    real.model[-1].dfl.requires_grad_(False)
    real = SimpleNamespace(
        model=real.to(memory_format=torch.channels_last),
        mode=nullcontext(),
        criterion=fake_model.criterion,
        strides=fake_model.strides,
    )
    for plan in (KEEP_ALL, Plan((("backbone.2", REBUILD), ("neck.5", RECOMPUTE)))):
        fake_bytes, real_bytes = (MicroBatchTracer(each, 64, boxes=5).trace(2, plan) for each in (fake_model, real))
        # Real kernels keep a few small tensors, such as statistics, that fake kernels do not.
        assert fake_bytes == pytest.approx(real_bytes, rel=0.01)


def test_a_model_without_distributions_of_distances_has_ultralytics_loss(fake_model):
    """Its tables have an entry for each box and anchor."""
    criterion = fake_model.criterion
    plain = SimpleNamespace(
        criterion=type(criterion)(
            SimpleNamespace(
                parameters=lambda: iter([torch.empty(0)]),
                args=criterion.hyp,
                model=[SimpleNamespace(stride=criterion.stride, nc=criterion.nc, reg_max=1)],
            )
        ),
        strides=fake_model.strides,
    )
    anchors = sum((128 // stride) ** 2 for stride in fake_model.strides)
    assert loss_bytes.loss_bytes(plain, 128, 60, amp=True).bytes_per_image > 4 * 60 * anchors


def test_models_with_two_heads_are_refused():
    with pytest.raises(ConfigError, match="has two heads"):
        load("yolov10n.yaml")


def test_bytes_are_linear_in_images(tracer):
    """A profile, which runs layers one by one, is no trace of a micro-batch."""
    tracer.profile(Roofline(65, 320))
    lines = tracer.linear_bytes()
    kept_bytes, peak_bytes = tracer.trace(100)
    assert lines.kept(100) == pytest.approx(kept_bytes, rel=1e-3)  # except for rounding to blocks of 512 bytes
    assert lines.peak(100) == pytest.approx(peak_bytes, rel=1e-3)


def test_plans_keep_less(fake_model, tracer):
    plans = KEEP_ALL, every_layer(fake_model, REBUILD), every_layer(fake_model, RECOMPUTE)
    keep, rebuild, recompute = (tracer.trace(8, plan) for plan in plans)
    assert recompute[0] < 0.8 * rebuild[0] < 0.6 * keep[0]
    assert recompute[1] < rebuild[1] < keep[1]


def test_weights_have_one_copy_in_half_precision(fake_model, tracer):
    tracer.trace(2)
    cast = [part for part in fake_model.model.modules() if isinstance(part, nn.Conv2d)]
    values = sum(part.weight.numel() for part in cast) - fake_model.model.model[-1].dfl.conv.weight.numel()
    assert tracer.half_weights_bytes == pytest.approx(2 * values, rel=0.02)  # biases, and blocks of 512 bytes


def test_freezing_and_layout_are_those_of_a_training(fake_model):
    frozen = [name for name, parameter in fake_model.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.21.dfl.conv.weight"]


def test_bytes_of_the_loss_do_not_depend_on_what_ran_before(fake_model):
    detection_loss._anchors.cache_clear()
    assert loss_bytes.loss_bytes(fake_model, 64, 5, True) == loss_bytes.loss_bytes(fake_model, 64, 5, True)


RESULTS = Path(__file__).parents[2] / "benchmarks/results"
EARLIER = json.loads((RESULTS / "checkpointing.json").read_text())["ours-m"]
LIMITS = json.loads((RESULTS / "limits_h200.json").read_text())


def predicted_mib(fake_model, row):
    """Return the peak that is predicted for the micro-batch and the plan of a row."""
    plan = Plan(tuple((name, mode) for mode, names in row["plan"].items() for name in names))
    found = estimate(fake_model, micro_batch=row["micro_batch"], plan=plan, boxes=49, optimizer="SGD")
    return found.peak_bytes / MIB


@pytest.mark.slow
def test_peaks_of_an_earlier_engine(deep, monkeypatch):
    """benchmarks/checkpointing.py measured them on an H100: YOLO12-M at several limits, with and without a plan.

    The engine ran Ultralytics' own loss then, which keeps target scores and copies of the predictions, and additions
    and concatenations as operations of their own.
    """
    monkeypatch.setattr(loss_bytes, "_run", loss_bytes._stocks_loss)
    monkeypatch.setattr(cuda_rules.FusedBatchNorm, "writes_into", staticmethod(lambda device: False))
    fake_model = load("yolo12m.yaml")
    assert len(EARLIER) >= 3
    for row in EARLIER if deep else EARLIER[-2:]:
        assert predicted_mib(fake_model, row) == pytest.approx(row["peak_mib"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["s", "x"])
def test_peaks_of_the_engine_as_it_is(scale, deep):
    """The same on an H200, where some rows ran as CUDA graphs, which hold memory beyond that of a micro-batch."""
    fake_model = load(f"yolo12{scale}.yaml")
    rows = {has_graphs: [row for row in LIMITS[f"ours-{scale}"] if bool(row["replayed"]) is has_graphs]
            for has_graphs in (False, True)}  # fmt: skip
    assert min(map(len, rows.values())) >= 2
    for has_graphs, each in rows.items():
        for row in each if deep else each[-1:]:
            peak_mib = predicted_mib(fake_model, row)
            if not has_graphs:
                assert peak_mib == pytest.approx(row["peak_mib"], rel=0.03)
                continue
            fraction, slow = row["ladder"][row["steps"][-1]["level"]]
            assert peak_mib < row["peak_mib"] <= peak_mib * Level(fraction, slow).graph_bytes
