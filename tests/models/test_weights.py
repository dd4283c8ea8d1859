from __future__ import annotations

import errno
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from yolov12.errors import UntrustedWeightsError, WeightsError
from yolov12.models import weights


def _empty() -> None:
    Path("w.pt").touch()


def _cut_off() -> None:
    torch.save({"model": nn.Linear(64, 64)}, "w.pt")
    Path("w.pt").write_bytes(Path("w.pt").read_bytes()[:9000])


def _cut_off_legacy() -> None:
    torch.save({"model": nn.Linear(64, 64)}, "w.pt", _use_new_zipfile_serialization=False)
    Path("w.pt").write_bytes(Path("w.pt").read_bytes()[:9000])


def _picture() -> None:
    Path("w.pt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))


def _archive_of_something() -> None:
    with zipfile.ZipFile("w.pt", "w") as archive:
        archive.writestr("folder/readme.txt", "hello")


def _tar() -> None:
    import tarfile

    body = b"cposix\nsystem\nX\x0c\0\0\0touch CANARY\x85R."
    with tarfile.open("w.pt", "w") as archive:
        member = tarfile.TarInfo("storages")
        member.size = len(body)
        archive.addfile(member, io.BytesIO(body))


def _two_records_of_one_name() -> None:
    torch.save({"model": nn.Identity()}, "w.pt")
    with zipfile.ZipFile("w.pt", "a") as archive:
        archive.writestr("w/data/0", b"x")
        archive.writestr("w/DATA/0", b"xyz")


def _script() -> None:
    torch.jit.script(nn.Linear(2, 2)).save("w.pt")


def _state_dict() -> None:
    torch.save(nn.Linear(2, 2).state_dict(), "w.pt")


def _nested_state_dict() -> None:
    torch.save({"model": nn.Linear(2, 2).state_dict()}, "w.pt")


def _other_data() -> None:
    torch.save([1, 2], "w.pt")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_empty, "empty, incomplete"),
        (_cut_off, "empty, incomplete"),
        (_cut_off_legacy, "empty, incomplete"),
        (_picture, "empty, incomplete"),
        (_archive_of_something, "empty, incomplete"),
        (_tar, "tar format that PyTorch wrote before 2017"),
        (_two_records_of_one_name, "same name"),
        (_script, "TorchScript"),
        (_state_dict, "load_state_dict"),
        (_nested_state_dict, "load_state_dict"),
        (_other_data, "a list without a model"),
    ],
)
def test_what_is_no_checkpoint_says_so_in_one_line(write: Callable[[], None], message: str) -> None:
    write()
    with pytest.raises(WeightsError, match=message) as caught:
        weights.load("w.pt")
    assert not isinstance(caught.value, UntrustedWeightsError)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("CANARY").exists()


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ("coco8.yaml", True),
        ("/home/me/data.yaml", True),
        ("C:\\data\\data.yaml", True),
        ("C:/data/data.yaml", True),
        (None, True),
        ("https://evil.example/data.yaml", False),
        ("HTTPS:/evil.example/data.zip", False),
        ("ul://me/datasets/x", False),
        ("\\\\host\\share\\data.yaml", False),
        ("../../../../evil/data/releases/download/1/x", False),
        ("%2e%2e/%2e%2e/evil", False),
    ],
)
def test_a_data_set_elsewhere_is_not_taken_from_a_checkpoint(data: str | None, kept: bool) -> None:
    named = {"data": data, "replay": data}
    torch.save({"model": nn.Identity(), "train_args": {**named, "imgsz": 320}}, "w.pt")
    settings = weights.load("w.pt")[0]["train_args"]
    assert settings == {**(named if kept else {}), "imgsz": 320}


def test_a_state_that_another_package_would_run_is_refused() -> None:
    torch.save({"model": nn.Identity(), "modelopt": {"modelopt": {}, "ranges": {}}}, "w.pt")
    with pytest.raises(UntrustedWeightsError, match="ModelOpt"):
        weights.load("w.pt")


def test_a_strangers_run_folder_cannot_smuggle_code_past_the_end_of_training(tmp_path):
    """At the end of a training, stock Ultralytics loads best.pt without restrictions to strip the optimizer."""
    from ultralytics.utils.torch_utils import strip_optimizer

    file = tmp_path / "best.pt"
    torch.save({"model": os.system}, file)
    with pytest.raises(UntrustedWeightsError, match="system"):
        strip_optimizer(file)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_the_system_does_not_give_is_not_called_damaged(tmp_path, monkeypatch, number):
    """To delete it would be bad advice: the file itself may be whole."""
    torch.save({"model": nn.Identity()}, file := tmp_path / "w.pt")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(weights.torch_file, "load", fail)
    with pytest.raises(WeightsError, match=f"cannot be read: {os.strerror(number)}. .*check its permissions") as caught:
        weights.read(file)
    assert "Delete" not in str(caught.value)
    with pytest.raises(WeightsError, match="cannot be read: Is a directory"):
        weights.read(tmp_path)
