"""Losses that run without synchronisation: Ultralytics' own for detection, as long as nobody has changed a part."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel, OBBModel, PoseModel, SegmentationModel
from ultralytics.utils import DEFAULT_CFG, tal
from ultralytics.utils import loss as loss_module
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss

from yolov12.mas import Config, Engine
from yolov12.mas.modules import each_tensor
from yolov12.models import candidates, detection_loss
from yolov12.training.adapter import unsynchronised
from yolov12.training.adapter.detection import DetectionTask, criterion_of
from yolov12.training.adapter.unsynchronised import replaces


class OwnLoss(v8DetectionLoss):
    """A loss of the user's own."""

    def preprocess(self, targets, batch_size, scale_tensor):
        return super().preprocess(targets, batch_size, scale_tensor)


class OwnBoxes(BboxLoss):
    """A loss of boxes of the user's own."""


@pytest.fixture
def model(small_model):
    torch.manual_seed(0)
    model = DetectionModel(small_model, nc=2, verbose=False).train()
    model.args = DEFAULT_CFG
    return model


@pytest.fixture
def calls(monkeypatch):
    """Count the losses that run without synchronisation."""
    found = []
    ours = unsynchronised.detection_loss
    monkeypatch.setattr(unsynchronised, "_waits", lambda device: True)
    monkeypatch.setattr(unsynchronised, "detection_loss", lambda *given: (found.append(1), ours(*given))[1])
    return found


def batch(images=3, side=64):
    boxes = 2 * images
    return {
        "img": torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8),
        "batch_idx": torch.arange(boxes) // 2.0,
        "cls": torch.zeros(boxes, 1),
        "bboxes": torch.cat((torch.rand(boxes, 2), 0.1 + 0.4 * torch.rand(boxes, 2)), 1),
    }


def preprocess(part):
    return {**part, "img": part["img"].float() / 255}


def loss_of(model, given, preprocess=preprocess, images=2):
    """Return the loss of the first images of a batch, as the engine computes it, and its gradient."""
    task = DetectionTask(preprocess, multi_scale=False, overlapping_masks=True)
    task.workload(given)
    part = each_tensor(task.part(given, 0, images), torch.clone)
    loss = task.loss(model, part)
    return loss, torch.autograd.grad(loss.value.sum(), next(model.parameters()))[0]


def test_the_engine_runs_it_with_the_values_of_stock(model, calls):
    given = batch()
    loss, gradient = loss_of(model, given)
    assert len(calls) == 1
    assert "loss" not in vars(criterion_of(model))
    criterion = criterion_of(model)
    criterion.assigner.register_forward_hook(lambda module, inputs, output: None)  # so stock's own runs
    other, wanted = loss_of(model, given)
    assert len(calls) == 1
    torch.testing.assert_close(loss.value, other.value, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.normaliser, other.normaliser, rtol=1e-5, atol=0)
    torch.testing.assert_close(dict(loss.items), dict(other.items), rtol=1e-5, atol=0)
    # In single precision, the layers between the loss and the first one round: 3e-5 at most over 150 seeds.
    assert (gradient - wanted).norm() <= 1e-4 * wanted.norm()


def test_on_the_cpu_nothing_is_waited_for(model, monkeypatch):
    monkeypatch.setattr(unsynchronised, "detection_loss", None)
    loss_of(model, batch())


@pytest.mark.parametrize("is_ours", [True, False])
def test_predictions_lie_in_memory_as_the_loss_reads_them(model, monkeypatch, is_ours):
    """The kernels read (images, channels, anchors), and Ultralytics' loss (images, anchors, channels)."""
    found = []
    monkeypatch.setattr(unsynchronised, "_waits", lambda device: is_ours)
    monkeypatch.setattr(unsynchronised, "_is_due", lambda criterion, predictions: found.append(predictions))
    loss_of(model.to(memory_format=torch.channels_last), batch())
    for key in ("boxes", "scores"):
        assert found[0][key].is_contiguous() is is_ours
        assert found[0][key].permute(0, 2, 1).is_contiguous() is not is_ours


def test_the_gradient_is_the_same_for_every_split(model, calls):
    """In float64. Some images have no box, and the labels of one are crowded."""
    given, gradients = batch(7), []
    given["batch_idx"] = torch.tensor([0.0, 0, 2, 2, 2, 2, 2, 2, 2, 3, 5, 5, 5, 5])
    model.double()
    criterion = criterion_of(model)
    criterion.proj = criterion.proj.double()
    for micro_batch in (8, 4, 2):
        task = DetectionTask(
            lambda part: {**part, "img": part["img"].double() / 255}, multi_scale=False, overlapping_masks=True
        )
        with Engine(model, task, Config(micro_batch=micro_batch, bn_group=2)) as engine:
            engine.step(given)
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
        model.zero_grad()
    assert len(calls) >= 1 + 2 + 4
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 2e-5 * gradients[0].norm()


def test_a_failed_allocation_in_the_loss_changes_nothing(model, calls, monkeypatch):
    given, gradients, to_device = batch(4), [], candidates.to_device
    for failing in range(5):
        copies = iter(range(99))

        def copy(*args, copies=copies, failing=failing):
            if next(copies) == failing - 1:
                raise MemoryError
            return to_device(*args)

        for module in (candidates, detection_loss):
            monkeypatch.setattr(module, "to_device", copy)
        detection_loss._anchors.cache_clear()
        task = DetectionTask(preprocess, multi_scale=False, overlapping_masks=True)
        with Engine(model, task, Config(micro_batch=4, bn_group=2)) as engine:
            engine.step(given)
        assert "loss" not in vars(criterion_of(model))
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
        model.zero_grad()
        assert next(copies) > failing
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("task", ["obb", "segment", "pose"])
def test_other_tasks_run_as_they_are(tiny_models, task):
    kinds = {"obb": OBBModel, "segment": SegmentationModel, "pose": PoseModel}
    model = kinds[task](tiny_models[task], verbose=False)
    model.args = DEFAULT_CFG
    assert not replaces(criterion_of(model))


def test_two_heads_run_as_they_are(model):
    model.model[-1].end2end = True
    assert not replaces(E2ELoss(model))


def _labels_that_preprocessing_adds(part):
    part = preprocess(part)
    return {key: torch.cat((value, value[-1:])) if key != "img" else value for key, value in part.items()}


def _labels_that_preprocessing_changes(part):
    part["bboxes"].mul_(0.5)
    return preprocess(part)


@pytest.mark.parametrize("change", [_labels_that_preprocessing_adds, _labels_that_preprocessing_changes])
def test_labels_that_a_user_changes_count(model, calls, change):
    """The boxes on the host are then not those of the loss."""
    given = batch()
    loss, _ = loss_of(model, given, change)
    assert not calls
    wanted = model(change(each_tensor(DetectionTask.opened(_part(given)), torch.clone)))[0]
    torch.testing.assert_close(loss.value, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [-1.0, 2.0, float("nan")])
def test_classes_that_the_model_does_not_have_are_left_to_stock(model, calls, kind):
    """Stock raises an error for most of them. A kernel would read memory that belongs to something else."""
    given = batch()
    given["cls"][0] = kind
    with suppress(IndexError):
        loss_of(model, given)
    assert not calls


def _part(given):
    task = DetectionTask(preprocess, multi_scale=False, overlapping_masks=True)
    task.workload(given)
    return task.part(given, 0, 2)


def _subclass(model, monkeypatch):
    model.criterion = OwnLoss(model)


def _part_of_the_loss(model, monkeypatch):
    model.criterion.bbox_loss = OwnBoxes(16)


def _method(model, monkeypatch):
    monkeypatch.setattr(v8DetectionLoss, "preprocess", lambda self, *given: OwnLoss.preprocess(self, *given))


def _assigner(model, monkeypatch):
    model.criterion.assigner.get_pos_mask = model.criterion.assigner.get_pos_mask.__func__.__get__(
        model.criterion.assigner
    )


def _function(module, name="bbox_iou"):
    def change(model, monkeypatch):
        stock = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **more: stock(*given, **more))

    change.__name__ = f"{module.__name__}.{name}"
    return change


def _function_of_torch(model, monkeypatch):
    monkeypatch.setattr(tal, "xyxy2xywh", nn.functional.softplus)
    monkeypatch.setattr(loss_module, "xywh2xyxy", nn.functional.relu)


def _decorator_of_torch(model, monkeypatch):
    assigner = tal.TaskAlignedAssigner
    in_its_own_precision = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(assigner, "get_box_metrics", in_its_own_precision(assigner.get_box_metrics))


def _class_weights(model, monkeypatch):
    model.criterion.class_weights = torch.ones(1, 1, 2)


def _positive_weight(model, monkeypatch):
    model.criterion.bce = nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.ones(1))


def _second_choice(model, monkeypatch):
    model.criterion.assigner.topk2 = 1


def _hook(model, monkeypatch):
    model.criterion.bbox_loss.register_forward_hook(lambda module, inputs, output: None)


CHANGES = [
    _subclass,
    _part_of_the_loss,
    _method,
    _assigner,
    _function_of_torch,
    _decorator_of_torch,
    _class_weights,
    _positive_weight,
    _second_choice,
    _hook,
]
CHANGES += [
    _function(loss_module),
    _function(tal),
    _function(loss_module, "make_anchors"),
    _function(loss_module, "bbox2dist"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_part_of_the_users_own_runs_as_it_is(model, monkeypatch, change):
    criterion_of(model)
    assert replaces(model.criterion)
    change(model, monkeypatch)
    assert not replaces(model.criterion)


def test_a_hook_on_all_modules_sees_stocks_own(model):
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        assert not replaces(criterion_of(model))
    finally:
        handle.remove()
    assert replaces(criterion_of(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
def test_on_a_gpu_a_micro_batch_runs_without_synchronisation(model, calls):
    """Forward pass, loss and backward pass in mixed precision. The first time, kernels are compiled and searched."""
    model = model.cuda().to(memory_format=torch.channels_last)
    task = DetectionTask(preprocess, multi_scale=False, overlapping_masks=True, only_scales=True)
    given = batch(4, side=128)
    task.workload(given)
    for mode in ("default", "error"):
        part = each_tensor(task.part(given, 0, 4), torch.Tensor.cuda)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.float16):
                loss = task.loss(model, part)
            loss.value.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 2
