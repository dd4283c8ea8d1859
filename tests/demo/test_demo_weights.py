"""The weights that come with the package: the file that the script made, in every package, found by name anywhere."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from ultralytics import YOLO

import yolov12
from yolov12.demo import DemoSpec
from yolov12.demo.board import HELD_BACK
from yolov12.models import weights
from yolov12.models.weight_names import DEMO

ROOT = Path(__file__).parents[2]
INSIDE = f"yolov12/demo/{DEMO}"
FILE = Path(yolov12.__file__).parent / "demo" / DEMO


def test_the_file_is_small_and_the_one_of_the_measurement() -> None:
    data = FILE.read_bytes()
    made = json.loads((ROOT / "benchmarks" / "results" / "demo_model.json").read_text())["file"]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (made["bytes"], made["sha256"])
    assert len(data) < 6e6


@pytest.mark.parametrize("builder", [SdistBuilder, WheelBuilder])
def test_packages_have_the_file(builder: type) -> None:
    assert INSIDE in {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}


def test_the_image_has_the_file() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules.index(f"!{INSIDE}") > rules.index("**/*.pt")


@pytest.mark.parametrize("name", [DEMO, DEMO.removesuffix(".pt")])
def test_the_name_is_enough_in_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = YOLO(name)
    assert tuple(model.names.values()) == DemoSpec(hold_back=HELD_BACK).names
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_current_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(DEMO).touch()
    assert weights.resolve(DEMO) == DEMO


def test_nothing_in_it_is_of_the_machine_that_made_it() -> None:
    checkpoint = weights.read(FILE)
    assert checkpoint.keys() == {"model", "train_args", "license"}
    assert not [value for value in checkpoint["train_args"].values() if "/" in str(value)]
    assert not {"pt_path", "yaml_file"} & {*vars(checkpoint["model"]), *checkpoint["model"].yaml}
    assert {tensor.dtype for tensor in checkpoint["model"].parameters()} == {torch.float16}
