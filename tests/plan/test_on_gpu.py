"""Memory traced without a GPU, compared with the allocator of a GPU."""

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, RECOMPUTE, Checkpointing, Plan
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.step.upsampling import Upsampling
from yolov12.models.activations import activations
from yolov12.models.candidates import Labels
from yolov12.models.detection_loss import detection_loss
from yolov12.models.layer_names import layer_names
from yolov12.plan.fake_model import load
from yolov12.plan.loss_bytes import _boxes
from yolov12.plan.micro_batch import MicroBatchTracer
from yolov12.training.adapter.images import scaled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IMAGES, BOXES = 8, 50


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_a_micro_batch(recompute):
    fake_model = load("yolov12n.yaml")
    names = layer_names(fake_model.model)
    plan = Plan(tuple((name, RECOMPUTE) for name in names)) if recompute else KEEP_ALL
    predicted = MicroBatchTracer(fake_model, 640, BOXES).trace(IMAGES, plan)

    model = DetectionModel("yolov12n.yaml", verbose=False).cuda().to(memory_format=torch.channels_last).train()
    model.model[-1].dfl.requires_grad_(False)
    model.args = fake_model.model.args
    norms = GroupedBatchNorm(model, activations(model))
    checkpointing = Checkpointing(model, candidates(model, layer_names(model)), norms)
    host = _boxes(IMAGES, BOXES, 80, torch.Generator().manual_seed(0))
    boxes = {key: value.cuda() for key, value in host.items()}
    labels = Labels(host["batch_idx"], host["bboxes"], host["cls"])
    criterion = model.init_criterion()
    for _ in range(2):  # the first pass allocates the workspaces of libraries
        model.zero_grad()
        norms.begin()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated_bytes = torch.cuda.memory_allocated()
        upsampling = Upsampling(model)
        with torch.autocast("cuda", torch.float16), norms.within((IMAGES,), 0), upsampling.within():
            ahead = torch.zeros(IMAGES, 3, 640, 640, dtype=torch.uint8, device="cuda")
            batch = {**boxes, "img": scaled(ahead, torch.float16)}
            with checkpointing.within(plan):
                predictions = model(batch["img"])
                kept_bytes = torch.cuda.memory_allocated() - allocated_bytes
                kept_bytes -= predictions["boxes"].nbytes + predictions["scores"].nbytes  # they are part of the loss
                loss = detection_loss(criterion, predictions, labels, batch["cls"])[0].sum()
            del predictions
            with torch.autocast("cuda", enabled=False):
                loss.backward()
        peak_bytes = torch.cuda.max_memory_allocated() - allocated_bytes
        del ahead, batch, loss
    print(f"kept {kept_bytes / predicted[0]:.3f}, peak {peak_bytes / predicted[1]:.3f} of what is predicted")
    assert kept_bytes == pytest.approx(predicted[0], rel=0.05)
    assert peak_bytes == pytest.approx(predicted[1], rel=0.05)
