"""Whatever Ultralytics reads with `torch.load` is read without running its code; text encoders are refused."""

from __future__ import annotations

import io
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics import NAS
from ultralytics.models.sam import build, build_sam3
from ultralytics.models.yolo.depth import calibrate
from ultralytics.models.yolo.world.train import WorldTrainer
from ultralytics.models.yolo.yoloe.train import YOLOETrainerFromScratch
from ultralytics.nn.tasks import YOLOEModel
from ultralytics.utils import dist
from ultralytics.utils.patches import torch_load

from yolov12 import own_files
from yolov12.errors import MissingWeightsError, UnreadableWeightsError, UntrustedWeightsError


def _text_embeddings(trainer: Any) -> Callable[[str], Any]:
    def read(file: str) -> Any:
        Path(file).rename("text_embeddings_x.pt")
        model = SimpleNamespace(text_model="x")
        return trainer.generate_text_embeddings(SimpleNamespace(model=model, device="cpu"), ["a"], 1, Path())

    return read


def _world_embeddings(file: str) -> Any:
    Path(file).rename("text_embeddings_clip_ViT-B_32.pt")
    return WorldTrainer.generate_text_embeddings(SimpleNamespace(device="cpu"), ["a"], 1, Path())  # type: ignore[arg-type]


def _open(file: str) -> Any:
    with Path(file).open("rb") as stream:
        return torch_load(stream)


DOORS: dict[str, Callable[[str], Any]] = {
    "SAM": lambda file: build._load_checkpoint(nn.Linear(1, 1), file),
    "SAM 3": lambda file: build_sam3._load_checkpoint(nn.Linear(1, 1), file),
    "NAS": NAS,
    "World": _world_embeddings,
    "YOLOE": _text_embeddings(YOLOETrainerFromScratch),
    "depth": lambda file: calibrate.calibrate_checkpoint(file, None, None),  # type: ignore[arg-type]
    "path": torch_load,
    "Path": lambda file: torch_load(Path(file), map_location="cpu"),
    "name of the argument": lambda file: torch_load(f=file),
    "weights_only": lambda file: torch_load(file, weights_only=True),
    "stream": _open,
    "buffer": lambda file: torch_load(io.BytesIO(Path(file).read_bytes())),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_no_door_runs_code(door: str, zipped: bool, evil: Any, canary: Path) -> None:
    torch.save({"a": torch.ones(1), "model": evil}, "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UntrustedWeightsError, match=r"builtins\.eval.*YOLOV12_TRUST_WEIGHTS=1"):
        DOORS[door]("evil.pt")
    assert not canary.exists()


def test_what_sam_and_the_trainers_need_is_read() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({"model": OrderedDict(layer.state_dict())}, "sam_b.pt")
    assert torch.equal(build._load_checkpoint(other, "sam_b.pt").weight, layer.weight)
    embeddings = {"a": torch.ones(3, dtype=torch.float16)}
    torch.save(embeddings, "t.pt")
    assert torch.equal(_world_embeddings("t.pt")["a"], embeddings["a"])
    torch.save(embeddings, "meta.pt")
    assert torch_load("meta.pt", map_location="meta")["a"].device.type == "meta"
    with pytest.raises(MissingWeightsError):
        torch_load("none.pt")
    with pytest.raises(UnreadableWeightsError):
        torch_load(io.BytesIO(b"nothing"))


def test_the_switch_and_a_pickle_module_of_the_program_are_those_of_torch(
    evil: Any, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    torch.save(evil, "evil.pt")
    torch_load("evil.pt", pickle_module=pickle)
    assert canary.exists()
    canary.unlink()
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")
    torch_load("evil.pt")
    assert canary.exists()


READ = """
import sys
from ultralytics.utils.patches import torch_load
from yolov12.errors import UntrustedWeightsError
for file in sys.argv[1:]:
    try:
        print(type(torch_load(file)["trainer"].own).__name__)
    except UntrustedWeightsError:
        print("refused")
"""


@pytest.mark.parametrize("in_another_process", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_processes_of_a_training_read_the_state_that_it_wrote_and_no_other(
    in_another_process: bool,
    start_script: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Ultralytics hands its trainer to one process per GPU with cloudpickle, in a file."""
    monkeypatch.setattr(dist, "USER_CONFIG_DIR", tmp_path)
    trainer = type("Trainer", (), {"own": io.StringIO(), "args": SimpleNamespace(), "model": None, "callbacks": {}})()
    (tmp_path / "read.py").write_text(READ)
    with own_files.shared():
        state = Path(dist.generate_ddp_file(trainer)).with_suffix(".pt")
        copy = shutil.copy(state, tmp_path / "copy.pt")
        if in_another_process:
            output, _ = start_script(tmp_path / "read.py", state, copy).communicate()
        else:
            monkeypatch.setattr(own_files, "_written", set())
            monkeypatch.setattr("sys.argv", ["read.py", str(state), str(copy)])
            exec(READ, {})
            output = capsys.readouterr().out
    assert output.split()[-2:] == ["StringIO", "refused"], output


@pytest.mark.parametrize("encoder", ["mobileclip:blt", "mobileclip2:b", "clip:evil.pt", "clip:/tmp/ViT-B/32", "x:y"])
def test_a_text_encoder_that_nobody_checks_is_refused_before_anything_is_installed(encoder: str) -> None:
    with pytest.raises(UntrustedWeightsError, match=r"text encoder .* YOLOV12_TRUST_WEIGHTS=1"):
        YOLOEModel.get_text_pe(SimpleNamespace(text_model=encoder), ["a"])  # type: ignore[arg-type]
    with pytest.raises(UntrustedWeightsError, match="mobileclip:blt"):
        YOLOEModel.get_text_pe(SimpleNamespace(), ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize(("encoder", "trusted"), [("clip:ViT-B/32", ""), ("mobileclip:blt", "1")])
def test_other_text_encoders_are_those_of_ultralytics(
    encoder: str, trusted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", trusted)
    from yolov12.untrusted.torch_load import get_text_pe

    asked: list[Any] = []
    model = SimpleNamespace(text_model=encoder)
    get_text_pe(lambda model, *texts: asked.append((model.text_model, texts)), model, ["a"])
    assert asked == [(encoder, (["a"],))]
