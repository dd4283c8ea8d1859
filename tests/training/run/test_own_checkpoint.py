"""A model whose class stands in the user's script: the process that wrote a checkpoint reads it, and no other does."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import strip_optimizer

from yolov12 import files, own_files
from yolov12.errors import UntrustedWeightsError
from yolov12.models import weights
from yolov12.training.run import process_group


class OwnModel(DetectionModel):
    """A class that no allow-list knows."""


class OwnTrainer(DetectionTrainer):
    """Trains it."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        return self.set_model_names_for_load(OwnModel(cfg, nc=self.data["nc"], verbose=False))


class OwnSaves(OwnTrainer):
    """Writes `last.pt` itself."""

    def save_model(self):
        super().save_model()
        torch.save({**torch.load(self.last, weights_only=False), "mine": 1}, self.last)


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
    run = trainings.train(tmp_path, trainer=OwnSaves, epochs=1, save_period=1)
    folder = run.folder / "weights"
    assert len(run.results) == 1
    assert YOLO(folder / "last.pt").ckpt["mine"] == 1
    for name in ("last.pt", "best.pt", "epoch0.pt"):
        assert type(YOLO(folder / name).model) is OwnModel
    YOLO(folder / "best.pt").save(io.BytesIO())
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
    monkeypatch.setattr(own_files, "_written", set())  # another process wrote none of them

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
    with path.open("rb") as file:
        own_files.remember(file)
    assert weights.load(path)[0]["modelopt"] == {"ranges": {}}


def is_own(path):
    with path.open("rb") as file:
        return own_files.is_own(file)


def test_a_file_that_takes_the_name_of_one_that_is_written_is_not_trusted(tmp_path, monkeypatch):
    """Another writer to the folder swaps the file at the worst moments: before its name is final, and right after."""
    path, other = tmp_path / "last.pt", tmp_path / "other.pt"

    def swap(name):
        other.write_bytes(b"theirs")
        other.replace(name)

    with files.replacing(path) as unfinished:
        unfinished.write_bytes(b"mine")
        swap(unfinished)
    assert not is_own(path)
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda old, new: (rename(old, new), old != other and swap(new)))
    files.write(path, lambda file: file.write(b"mine"))
    assert path.read_bytes() == b"theirs"
    assert not is_own(path)


def test_what_another_user_writes_at_the_same_time_is_not_trusted(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_bytes(b"older")
    with own_files.written(path):
        pass
    assert not is_own(path)
    with own_files.written(path):
        path.write_bytes(b"mine")
    assert is_own(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with own_files.written(path):
        path.write_bytes(b"not mine")
    assert not is_own(path)


_CHILD = """
import sys
from pathlib import Path
from yolov12 import files, own_files
with open(sys.argv[1], "rb") as file:
    assert own_files.is_own(file)
files.write(sys.argv[2], lambda file: file.write(b"best"))
"""


def test_a_process_that_starts_the_ranks_and_they_trust_each_others_files(tmp_path):
    """With `device=0,1`, the process that calls `train` reads the checkpoints that rank 0 writes."""
    before, best, forged = (tmp_path / name for name in ("last.pt", "best.pt", "forged.pt"))
    files.write(before, lambda file: file.write(b"last"))  # which ranks resume from
    own_files_there = dict(os.environ)

    def start_ranks(trainer):
        subprocess.run([sys.executable, "-c", _CHILD, before, best], check=True)
        forged.write_bytes(b"other")

    process_group.launch(start_ranks, SimpleNamespace(ddp=True))
    assert is_own(best)
    assert not is_own(forged)
    assert dict(os.environ) == own_files_there
    later = subprocess.run([sys.executable, "-c", _CHILD, before, best], capture_output=True, text=True, check=False)
    assert "AssertionError" in later.stderr


@pytest.mark.parametrize("others", ["link", "owner", "nonsense"])
def test_notes_of_others_are_neither_read_nor_written(tmp_path, monkeypatch, others):
    """In /tmp, another user can make a file or a link of a name that is free again."""
    best, notes, there = (tmp_path / name for name in ("best.pt", "notes", "there"))
    best.write_bytes(b"best")
    with best.open("rb") as file:
        there.write_text(
            " ".join(map(str, own_files._identity(os.fstat(file.fileno())))) + "\n" + "?" * (others == "nonsense")
        )
    if others == "link":
        notes.symlink_to(there)
    else:
        there.rename(notes)
    before = notes.read_text()
    monkeypatch.setenv(own_files._SHARED, str(notes))
    if others == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not is_own(best)
    if others != "nonsense":
        files.write(tmp_path / "other.pt", lambda file: file.write(b"other"))
        assert notes.read_text() == before


_RANK_1 = """
import sys
from yolov12 import own_files
own_files.join(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    print(own_files.is_own(file))
"""


def test_ranks_trust_what_rank_0_writes(tmp_path, monkeypatch):
    """Like a training under torchrun, where every rank reads `best.pt` in the end."""
    sent, best, alone = [], tmp_path / "best.pt", dict(os.environ)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda notes, source: sent.extend(notes))
    with own_files.shared():
        process_group.setup_group(lambda trainer: None, SimpleNamespace())
        files.write(best, lambda file: file.write(b"best"))
        rank_1 = [sys.executable, "-c", _RANK_1, *sent, best]
        assert subprocess.run(rank_1, env=alone, capture_output=True, check=True).stdout == b"True\n"


def test_a_save_model_that_replaces_that_of_the_class_is_called_at_the_ends_of_epochs(
    trainings, tiny_model, tmp_path, monkeypatch
):
    stock, epochs = BaseTrainer.save_model, []

    def save_model(trainer):
        epochs.append(trainer.epoch)
        return stock(trainer)

    monkeypatch.setattr(BaseTrainer, "save_model", save_model)
    run = trainings.train(tmp_path, tiny_model, save_every="1", val=False)
    assert epochs == [0, 1]
    assert "last.pt before the end of the epoch: save_model is your own" in run.log
    assert (run.folder / "weights" / "last.pt").exists()
