"""Trainings on a GPU, with workers and half precision: interrupted ones, and images that get smaller."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = {"device": 0, "workers": 2, "imgsz": 320, "data": "demo:images=80,val=0.2", "amp": False, "cache": "ram"}


class PowerCutError(Exception):
    """In the second epoch."""


def cut(trainer):
    if trainer.epoch == 1:
        raise PowerCutError


def test_an_interrupted_run_goes_on_with_the_same_images_and_weights(trainings, tmp_path):
    """In single precision, and with one micro-batch a batch, rounding is alike."""
    settings = {**ON_GPU, "bn_group": 8, "epochs": 3}
    whole = trainings.train(tmp_path, **settings)
    part = trainings.train(tmp_path, **settings, callbacks=[("on_train_batch_end", cut)], raises=PowerCutError)
    again = trainings.train(tmp_path, part.folder / "weights" / "last.pt", resume=True)
    assert "resume: epoch 2, after batch 1 of 8" in again.log
    assert again.sums == whole.sums[-len(again.sums) :]
    assert len(again.results) == 3
    for name, value in whole.after.items():
        assert torch.allclose(value.float(), again.after[name].float(), rtol=1e-3, atol=1e-4), name


def test_images_get_smaller_where_nothing_else_helps(trainings, tmp_path):
    """YOLOv8-N with its optimizer takes about 60 MiB, an image of 1,280 pixels with all recomputed about 150."""
    settings = {**ON_GPU, "imgsz": 1280, "batch": 2, "nbs": 2, "epochs": 1, "mem_limit": "180MiB", "mas_min_imgsz": 320}
    run = trainings.train(tmp_path, **settings)
    assert any(event.startswith("image size 1280 to 1248") for row in run.memory for event in row["events"].split("; "))
    assert all(int(row["image_size"].split("x")[0]) < 1280 for row in run.memory)
    assert run.summary["images_lost"] == 0
