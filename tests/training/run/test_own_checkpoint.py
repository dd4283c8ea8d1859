"""A model whose class stands in the user's script: the process that wrote a checkpoint reads it, and no other does."""

import os

import pytest
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import strip_optimizer

from yolov12 import own_files
from yolov12.errors import UntrustedWeightsError
from yolov12.models import weights


class OwnModel(DetectionModel):
    """A class that no allow-list knows."""


class OwnTrainer(DetectionTrainer):
    """Trains it."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        return self.set_model_names_for_load(OwnModel(cfg, nc=self.data["nc"], verbose=False))


def replaced_by_another_file(path, content, status):
    other = path.with_name("other.pt")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def changed_in_place(path, content, status):
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def copied_from_another_name(path, content, status):
    path.unlink()
    path.write_bytes(content)


OTHERS = {replaced_by_another_file: "last.pt", changed_in_place: "best.pt", copied_from_another_name: "epoch0.pt"}


def test_a_run_ends_with_its_own_checkpoint_and_nobody_elses(trainings, tmp_path):
    run = trainings.train(tmp_path, trainer=OwnTrainer, epochs=1, save_period=1)
    folder = run.folder / "weights"
    assert len(run.results) == 1
    for name in ("last.pt", "best.pt", "epoch0.pt"):
        assert type(YOLO(folder / name).model) is OwnModel
    YOLO(folder / "best.pt").save(folder / "saved.pt")
    assert type(YOLO(folder / "saved.pt").model) is OwnModel
    files = (
        (replaced_by_another_file, "last.pt"),
        (changed_in_place, "best.pt"),
        (copied_from_another_name, "epoch0.pt"),
    )
    for change, name in files:
        path = folder / name
        change(path, path.read_bytes(), path.stat())
        with pytest.raises(UntrustedWeightsError, match=r"OwnModel.*YOLOV12_TRUST_WEIGHTS=1"):
            YOLO(path)


@pytest.mark.parametrize("spelling", ["model", "resume"])
def test_a_resume_in_another_process_is_refused_by_name_and_can_be_trusted(
    trainings, power, tiny_model, tmp_path, monkeypatch, spelling
):
    run = trainings.train(tmp_path, trainer=OwnTrainer, callbacks=power.cut_at(6), raises=power.CutError)
    last = run.folder / "weights" / "last.pt"
    monkeypatch.setattr(own_files, "_written", {})  # another process wrote none of them

    def resume():
        model, how = (YOLO(last), True) if spelling == "model" else (YOLO(tiny_model), str(last))
        model.train(trainer=OwnTrainer, resume=how)
        return model.trainer

    with pytest.raises(UntrustedWeightsError, match=r"OwnModel.*YOLOV12_TRUST_WEIGHTS=1"):
        resume()
    assert last.exists()
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")
    trainer = resume()
    assert type(trainer.model) is OwnModel
    assert trainer.epoch == 1


def test_a_model_that_was_trained_to_be_quantised_is_read_by_the_process_that_wrote_it(tmp_path):
    """NVIDIA ModelOpt restores its state by code, so it is refused in a file from elsewhere."""
    path = tmp_path / "last.pt"
    checkpoint = {"model": torch.nn.Identity(), "modelopt": {"ranges": {}}}
    torch.save(checkpoint, path)
    for read in (weights.load, strip_optimizer):  # which would make it a file of this process
        with pytest.raises(UntrustedWeightsError, match="ModelOpt"):
            read(path)
    own_files.remember(path)
    assert weights.load(path)[0]["modelopt"] == {"ranges": {}}
