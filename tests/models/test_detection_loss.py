"""The detection loss without synchronisation: values and gradients are those of Ultralytics'."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.utils.loss import v8DetectionLoss

from yolov12.mas import compile_ahead, triton_launch
from yolov12.models import detection_loss as detection_loss_module
from yolov12.models import fused_loss
from yolov12.models.candidates import Labels
from yolov12.models.detection_loss import detection_loss

CLASSES, BINS, STRIDES = 5, 16, (8.0, 16.0, 32.0)


class Head(nn.Module):
    """What a criterion reads of a model's last layer."""

    def __init__(self):
        super().__init__()
        self.nc, self.reg_max, self.stride = CLASSES, BINS, torch.tensor(STRIDES)


def criterion_for(device="cpu", dtype=torch.float32):
    model = nn.Module()
    model.model = nn.ModuleList([nn.Conv2d(1, 1, 1, device=device, dtype=dtype), Head()])
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    return v8DetectionLoss(model)


def without_ties(criterion):
    """Let stock choose no anchor with an alignment of zero.

    If fewer than ten anchors of a box have another, `torch.topk` chooses the rest by chance: the device and the size of
    the table decide. Such an anchor counts only if another box takes it as well.
    """
    stock = criterion.assigner.select_topk_candidates

    def select(metrics, topk_mask=None):
        return stock(metrics, topk_mask) * (metrics > 0)

    criterion.assigner.select_topk_candidates = select
    return criterion


def batch_for(boxes, seed=0, largest=0.5, device="cpu", places=None):
    draw = torch.Generator().manual_seed(seed)
    total = sum(boxes)
    centre, side = torch.rand(total, 2, generator=draw), 0.01 + largest * torch.rand(total, 2, generator=draw)
    bboxes = torch.cat((centre, side), 1)
    if places:  # edges on the points of anchors
        bboxes = (bboxes * places).round() / places
    batch = {
        "batch_idx": torch.repeat_interleave(torch.arange(len(boxes)), torch.tensor(boxes)).float(),
        "cls": torch.randint(0, CLASSES, (total, 1), generator=draw).float(),
        "bboxes": bboxes,
    }
    labels = Labels(batch["batch_idx"], batch["bboxes"], batch["cls"])
    return {key: value.to(device) for key, value in batch.items()}, labels


def predictions_for(images, seed=0, height=96, width=64, device="cpu", dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed + 1)
    sizes = [(int(height // stride), int(width // stride)) for stride in STRIDES]
    anchors = sum(h * w for h, w in sizes)
    boxes = 2 * torch.randn(images, 4 * BINS, anchors, generator=draw)
    scores = 3 * torch.randn(images, CLASSES, anchors, generator=draw) - 2
    return {
        "boxes": boxes.to(device, dtype).requires_grad_(),
        "scores": scores.to(device, dtype).requires_grad_(),
        "feats": [torch.empty(images, 0, h, w, device=device, dtype=dtype) for h, w in sizes],
    }


def both(criterion, stock, boxes, seed=0, dtype=torch.float32, device="cpu", **more):
    """Loss, items, and gradients of ours and of stock's."""
    found = []
    batch, labels = batch_for(boxes, seed, device=device, **more)
    for run in (
        lambda values: detection_loss(criterion, values, labels, batch["cls"])[:2],
        lambda values: stock(values, batch),
    ):
        values = predictions_for(len(boxes), seed, device=device, dtype=dtype)
        loss, items = run(values)
        gradients = torch.autograd.grad(
            (loss * loss.new_tensor([1.0, 2.0, 3.0])).sum(), (values["boxes"], values["scores"])
        )
        found.append((loss.detach(), torch.stack(list(items.values())), *gradients))
    return found


def assert_same(ours, stock, tolerance):
    for found, wanted in zip(ours, stock, strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert (found - wanted).float().norm() <= tolerance * wanted.float().norm()


NUMBERS = st.one_of(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.lists(st.just(0), min_size=1, max_size=3),
    st.tuples(st.integers(0, 3), st.integers(60, 150), st.integers(0, 3)).map(list),
)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.integers(0, 999), st.sampled_from([0.05, 0.5, 1.0]), st.sampled_from([None, 4, 16]))
def test_values_and_gradients_are_stocks(boxes, seed, largest, places):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 2e-6)):
        ours, stock = both(
            criterion_for(dtype=dtype), without_ties(criterion_for(dtype=dtype)), boxes, seed, dtype,
            largest=largest, places=places,
        )  # fmt: skip
        assert_same(ours, stock, tolerance)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the kernels run on the CPU, for single precision."""
    pytest.importorskip("triton")
    from tests.interpreter import run_on_cpu

    for kernels in (fused_loss.loss_kernels, fused_loss.matching_kernels):
        run_on_cpu(monkeypatch, kernels, _EPS=1e-7, _PI=math.pi)
    monkeypatch.setattr(fused_loss, "supports", lambda *_: True)


@pytest.mark.parametrize(
    ("boxes", "largest", "places"), [([3, 0, 12], 0.5, None), ([80, 1], 0.1, 16), ([0, 0], 1.0, None)]
)
def test_kernels_compute_the_same(on_cpu, boxes, largest, places):
    ours, stock = both(criterion_for(), without_ties(criterion_for()), boxes, largest=largest, places=places)
    assert_same(ours, stock, 2e-5)


def test_deterministic_mode_fills_nothing(on_cpu):
    """PyTorch's default in this mode is a launch and a pass over memory for every new tensor."""
    mode, fills = torch.utils.deterministic, []

    def look_and_launch(*arguments):
        fills.append(mode.fill_uninitialized_memory)
        triton_launch.launch(*arguments)

    (batch, labels), values = batch_for([3, 1]), predictions_for(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss, _, _ = detection_loss(criterion_for(), values, labels, batch["cls"], look_and_launch)
        loss.sum().backward()
        assert mode.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
    assert fills == [False] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_that_are_noted_are_those_that_a_loss_launches(on_cpu, dtype):
    launched = set()

    def note(kernel, grid, tensors, numbers, constants, warps):
        types = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        launched.add((kernel.fn.__name__, types, len(numbers), constants, warps))

    (batch, labels), values = batch_for([3, 1]), predictions_for(2, dtype=dtype)
    loss, _, _ = detection_loss(criterion_for(), values, labels, batch["cls"], note)
    loss.sum().backward()
    with compile_ahead.noted() as noted:
        fused_loss.note(dtype)
    assert launched == {
        (each.name, each.types, len(each.numbers), each.constants, each.warps) for each in noted.values()
    }


def test_in_double_precision_only_rounding_is_left(monkeypatch):
    """Stock adds its terms up in PyTorch's default type. Slices of images change nothing."""
    torch.set_default_dtype(torch.float64)
    try:
        criteria = criterion_for(dtype=torch.float64), without_ties(criterion_for(dtype=torch.float64))
        for criterion in criteria:
            criterion.proj = criterion.proj.double()
        for pairs in (detection_loss_module.PAIRS_PER_IMAGE, 10):
            monkeypatch.setattr(detection_loss_module, "PAIRS_PER_IMAGE", pairs)
            assert_same(*both(*criteria, [3, 0, 90, 12], dtype=torch.float64), 1e-14)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_loss_that_is_not_a_number_stays_one(request, kernels):
    """Stock's is none as well for a score that has overflowed, whose softplus is 0."""
    if kernels:
        request.getfixturevalue("on_cpu")
    for key, broken, at in (("boxes", math.nan, ...), ("scores", math.nan, ...), ("scores", -math.inf, (0, 1, 2))):
        values = predictions_for(2)
        values[key] = values[key].detach()
        values[key][at] = broken
        batch, labels = batch_for([3, 4])
        for loss in (
            detection_loss(criterion_for(), values, labels, batch["cls"])[0],
            criterion_for()(values, batch)[0],
        ):
            assert loss.isnan().any(), (key, broken)


@pytest.mark.parametrize("kernels", [False, True])
def test_predictions_outside_of_all_boxes_may_be_anything(request, kernels):
    """A list of matched anchors that is filled up with others gives them no weight."""
    if kernels:
        request.getfixturevalue("on_cpu")
    batch, labels = batch_for([3])
    labels.boxes.copy_(torch.tensor([0.75, 0.75, 0.2, 0.2]))
    values = predictions_for(1)
    values["boxes"] = values["boxes"].detach()
    values["boxes"][..., :8] = math.nan  # the first row
    values["boxes"].requires_grad_()
    loss, _, _ = detection_loss(criterion_for(), values, labels, batch["cls"])
    wanted, _ = without_ties(criterion_for())(values, batch)
    assert torch.allclose(loss, wanted, rtol=2e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), values["boxes"])
    assert gradient.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_values_and_gradients_are_stocks_without_synchronisation(monkeypatch, fused, dtype):
    supports = fused_loss.supports
    monkeypatch.setattr(fused_loss, "supports", lambda *given: fused and supports(*given))
    if fused:
        assert supports(criterion_for("cuda"), predictions_for(1, device="cuda"))
    criterion, stock = criterion_for("cuda"), without_ties(criterion_for("cuda"))
    for boxes in ([3, 0, 40, 12], [0, 0], [100, 1]):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            ours, wanted = both(criterion, stock, boxes, dtype=dtype, device="cuda")
            assert_same(ours, wanted, {torch.float32: 5e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype])
            batch, labels = batch_for(boxes, device="cuda")
            values, again = predictions_for(len(boxes), device="cuda", dtype=dtype), []
            slope = torch.tensor([1.0, 2.0, 3.0], device="cuda")
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):
                    loss, _, total = detection_loss(criterion, values, labels, batch["cls"])
                    again.append(
                        (loss, total, *torch.autograd.grad((loss * slope).sum(), (values["boxes"], values["scores"])))
                    )
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(torch.equal(one, other) for one, other in zip(*again, strict=True))
