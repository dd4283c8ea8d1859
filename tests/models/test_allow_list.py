from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld
from ultralytics.data import augment
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.nn import modules, tasks
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace
from ultralytics.utils.loss import v8DetectionLoss

from yolov12.errors import UnreadableWeightsError, UntrustedWeightsError
from yolov12.models import weights


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        records = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in records.items():
            archive.writestr(entry, content.replace(old, new) if entry.endswith("data.pkl") else content)


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize(
    "yaml",
    [
        "yolo12n",
        "yolo11n",
        "yolov8n",
        "yolov10n",
        "yolo26n",
        "yolov5n",
        "yolo11n-seg",
        "yolo11n-pose",
        "yolo11n-obb",
        "yolo11n-cls",
        "yolov8n-rtdetr",
        "yolov8s-world",
        "yoloe-11s-seg",
    ],
)
def test_what_ultralytics_saves_is_loaded(yaml: str) -> None:
    assert_loaded_as_saved(yaml, True)


def test_a_file_of_before_pytorch_zipped_them_is_loaded() -> None:
    assert_loaded_as_saved("yolo12n", False)


def assert_loaded_as_saved(yaml: str, zipped: bool) -> None:
    family = {"yolov8n-rtdetr": RTDETR, "yolov8s-world": YOLOWorld, "yoloe-11s-seg": YOLOE}.get(yaml, YOLO)
    saved = family(f"{yaml}.yaml").model.half()
    torch.save({"model": saved, "train_args": {"imgsz": 640}}, "a.pt", _use_new_zipfile_serialization=zipped)
    checkpoint, file = weights.load(Path("a.pt"))
    assert file == "a.pt"
    assert type(checkpoint["model"]) is type(saved)
    assert checkpoint["model"].yaml == saved.yaml
    assert_same_weights(checkpoint["model"], saved)


def test_a_loaded_model_computes_the_same_and_can_be_saved_again() -> None:
    first = YOLO("yolo12n.yaml")
    first.save("a.pt")
    second = YOLO("a.pt")
    second.save("b.pt")
    third = weights.load("b.pt")[0]["model"].float().eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(second.model.float().eval()(image)[0], third(image)[0])


@pytest.fixture
def mid_training(tiny_model: str) -> dict[str, Any]:
    """A checkpoint with every kind of entry that Ultralytics' trainers have written."""
    model = YOLO(tiny_model).model
    model.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    model.criterion = model.init_criterion()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    return {
        "epoch": 3,
        "best_fitness": np.float64(0.25),
        "model": None,
        "ema": deepcopy(model).half(),
        "updates": 12,
        "modelopt": None,
        "optimizer": optimizer.state_dict(),
        "scaler": torch.cuda.amp.GradScaler(enabled=False).state_dict(),
        "train_args": {
            **DEFAULT_CFG_DICT,
            "data": "coco8.yaml",
            "project": Path("runs"),
            "device": torch.device("cpu"),
        },
        "train_metrics": {"fitness": np.float32(0.5), "n": np.int64(2), "per_class": np.arange(6.0).reshape(2, 3)},
        "train_results": {"epoch": [1, 2], "time": [0.5, 1.0]},
        "stopper": OrderedDict(best_epoch=2),
        "date": "2025-02-19T00:00:00",
        "git": {"root": "None", "branch": None},
        "flags": {1, 2},
        "dtype": torch.float16,
    }


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_checkpoint_from_the_middle_of_a_training_is_loaded_whole(core: bytes, mid_training: dict[str, Any]) -> None:
    torch.save(mid_training, "last.pt")
    rewrite(Path("last.pt"), np.float64(0).__reduce__()[0].__module__.encode(), core)  # type: ignore[index, union-attr]
    loaded = weights.load("last.pt")[0]
    assert_same_weights(loaded.pop("ema"), mid_training.pop("ema"))
    for each in (loaded, mid_training):
        each["per_class"] = each["train_metrics"].pop("per_class").tolist()
        each["optimizer"] = [(k, s["exp_avg"].tolist()) for k, s in each["optimizer"]["state"].items()]
    assert loaded == mid_training
    assert type(loaded["best_fitness"]) is np.float64


def test_the_loss_in_a_checkpoint_still_computes(mid_training: dict[str, Any]) -> None:
    torch.save(mid_training, "last.pt")
    model = weights.load("last.pt")[0]["ema"].float()
    assert type(model.criterion) is v8DetectionLoss
    batch = {"img": torch.rand(1, 3, 64, 64), "batch_idx": torch.zeros(1), "cls": torch.zeros(1, 1)}
    loss, _ = model.train().loss(batch | {"bboxes": torch.full((1, 4), 0.5)})
    assert torch.isfinite(loss).all()


def test_the_loss_of_an_rtdetr_is_loaded() -> None:
    # Ultralytics before 8.4 leaves the loss in the checkpoints of a run that goes on
    loss = RTDETRDetectionLoss(nc=2, use_vfl=True)
    torch.save({"ema": nn.ModuleList([loss])}, "last.pt")
    loaded = weights.load("last.pt")[0]["ema"][0]
    assert type(loaded) is RTDETRDetectionLoss
    assert loaded.matcher.cost_gain == loss.matcher.cost_gain


@pytest.mark.parametrize("settings", [torch.zeros(2), 0])
def test_settings_of_another_type_are_one_clear_error(settings: Any) -> None:
    torch.save({"model": nn.Identity(), "train_args": settings}, "a.pt")
    with pytest.raises(UnreadableWeightsError, match="train_args of type"):
        weights.load("a.pt")


def test_a_modelopt_state_of_any_type_is_refused() -> None:
    torch.save({"model": nn.Identity(), "modelopt": torch.zeros(2)}, "a.pt")
    with pytest.raises(UntrustedWeightsError, match="ModelOpt"):
        weights.load("a.pt")


def test_a_data_set_with_a_name_too_long_for_a_path_is_left_out() -> None:
    torch.save({"model": nn.Identity(), "train_args": {"data": "%" + "x" * 5000}}, "a.pt")
    assert weights.load("a.pt")[0]["train_args"] == {}


@pytest.mark.parametrize(
    ("body", "cls"),
    [
        (b"cultralytics.nn.modules.block\nSilence\n)\x81}(ub", nn.Identity),
        (b"cultralytics.nn.modules\nConv\n)\x81}(ub", modules.Conv),
        (b"cultralytics.nn.tasks\nYOLOv10DetectionModel\n)\x81}(ub", tasks.DetectionModel),
        (b"cultralytics.yolo.utils.loss\nv8DetectionLoss\n)\x81}(X\x01\0\0\0xNub", v8DetectionLoss),
        (b"cultralytics.yolo.utils\nIterableSimpleNamespace\n)R}b", IterableSimpleNamespace),
        (b"cultralytics.yolo.data.augment\nToTensor\n)\x81}X\x04\0\0\0half\x89sb", augment.ToTensor),
        (b"cultralytics.yolo.data.augment\nCenterCrop\n)\x81}X\x01\0\0\0hK\x20sb", augment.CenterCrop),
        (b"cpathlib\nWindowsPath\nX\x04\0\0\0runsX\x01\0\0\0a\x86R", type(Path())),
        (b"cpathlib._local\nPosixPath\nX\x01\0\0\0/X\x01\0\0\0a\x86R", type(Path())),
        (b"ctorch\nSize\n(K\x01K\x02l\x85R", torch.Size),
    ],
)
def test_names_of_other_versions_and_systems(body: bytes, cls: type, write_zip: Callable[..., Path]) -> None:
    assert type(weights.read(write_zip(Path("old.pt"), body))) is cls


def test_a_method_of_a_layer_by_name(write_zip: Callable[..., Path]) -> None:
    # Segment and Pose of Ultralytics 8.0 to 8.2 hold such a method
    body = b"c__builtin__\ngetattr\ncultralytics.nn.modules.head\nDetect\nX\x07\0\0\0forward\x86R"
    assert weights.read(write_zip(Path("old.pt"), body)) is modules.Detect.forward


def test_the_transforms_of_a_classifier() -> None:
    from ultralytics.data.augment import classify_transforms

    model = YOLO("yolo11n-cls.yaml").model
    model.transforms = classify_transforms(size=32)
    torch.save({"model": model}, "cls.pt")
    image = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    from PIL import Image

    loaded = weights.load("cls.pt")[0]["model"].transforms
    assert torch.equal(loaded(Image.fromarray(image)), model.transforms(Image.fromarray(image)))


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_tiny"])
def test_layers_of_torchvision(backbone: str) -> None:
    saved = modules.TorchVision(backbone, weights=None)
    torch.save({"model": saved}, "tv.pt")
    assert_same_weights(weights.load("tv.pt")[0]["model"], saved)


def test_a_model_in_the_middle_of_a_distillation(tiny_model: str) -> None:
    from ultralytics.nn.distill_model import DistillationModel

    teacher, student = YOLO(tiny_model).model, YOLO(tiny_model).model
    teacher.args = student.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    saved = DistillationModel(teacher, student)
    torch.save({"ema": saved}, "last.pt")
    assert_same_weights(weights.load("last.pt")[0]["ema"], saved)


def test_a_bare_model_is_wrapped() -> None:
    model = YOLO("yolo12n.yaml").model
    torch.save(model, "bare.pt")
    assert_same_weights(weights.load("bare.pt")[0]["model"], model)
