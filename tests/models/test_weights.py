from __future__ import annotations

import copyreg
import io
import os
import pickle
import re
import struct
import subprocess
import sys
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
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld
from ultralytics.nn import modules, tasks
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace
from ultralytics.utils.loss import v8DetectionLoss

from yolov12.errors import UntrustedWeightsError, WeightsError
from yolov12.models import weights

# -- writing files, opcode by opcode ---------------------------------------------------------------------------------

Write = Callable[[Path, bytes], Path]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def made(module: str, attribute: str, **state: bytes) -> bytes:
    """An instance made without its __init__ and given attributes."""
    return name(module, attribute) + b")\x81" + mapping(**state) + b"b"


def write_zip(path: Path, body: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/version", b"3\n")
        for record, content in records.items():
            archive.writestr(f"a/{record.replace('_', '/')}", content)
    return path


def write_legacy(path: Path, body: bytes) -> Path:
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}))
    path.write_bytes(head + b"\x80\x02" + body + b"." + pickle.dumps([], 2))
    return path


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        records = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in records.items():
            archive.writestr(entry, content.replace(old, new) if entry.endswith("data.pkl") else content)


# -- files that want something -----------------------------------------------------------------------------------------

TOUCH = "touch CANARY"  # tests run in a temporary folder
CODE = "__import__('os').system('touch CANARY')"
CONV = name("ultralytics.nn.modules.conv", "Conv")
SYSTEM = name("posix", "system") + text(TOUCH)

HOSTILE = {
    "call": (SYSTEM + b"\x85R", "posix.system"),
    "eval": (name("builtins", "eval") + text(CODE) + b"\x85R", "builtins.eval"),
    "python 2 name": (name("__builtin__", "eval") + text(CODE) + b"\x85R", "builtins.eval"),
    "inst": (b"(" + text(TOUCH) + b"iposix\nsystem\n", "posix.system"),
    "obj": (b"(" + SYSTEM + b"o", "posix.system"),
    "instance": (
        name("subprocess", "Popen") + b"(" + text("touch") + text("CANARY") + b"l\x85\x81",
        "subprocess.Popen",
    ),
    "instance with keywords": (name("subprocess", "Popen") + b")}\x92", "subprocess.Popen"),
    "extension": (b"\x82\x77" + text(TOUCH) + b"\x85R", "copyreg extension 119"),
    "partial": (name("functools", "partial") + SYSTEM + b"\x86R)R", "functools.partial"),
    "nested pickle": (name("torch.storage", "_load_from_bytes") + b"U\x01.\x85R", "torch.storage._load_from_bytes"),
    "torch.load": (name("torch", "load") + text("other.pt") + b"\x85R", "torch.load"),
    "in-place function": (name("torch.nn.init", "zeros_") + b")R", "torch.nn.init.zeros_"),
    "our own package": (
        name("ultralytics.nn.tasks", "check_requirements") + text("x") + b"\x85R",
        "check_requirements",
    ),
    "module of a module": (text("ultralytics.nn.tasks") + text("torch.hub.load") + b"\x93)R", "torch.hub.load"),
    "function of a layer": (
        text("ultralytics.nn.tasks") + text("DetectionModel.load") + b"\x93)R",
        "ultralytics.nn.tasks.DetectionModel.load",
    ),
    "missing module": (made("no_such_package.models", "Net"), "no_such_package.models.Net"),
    "missing submodule": (made("torch.nn.modules.evil", "Net"), "torch.nn.modules.evil.Net"),
    "constructor": (
        name("ultralytics.nn.tasks", "DetectionModel") + mapping(activation=text(CODE)) + b"\x85R",
        "ultralytics.nn.tasks.DetectionModel",
    ),
    "constructor by inst": (
        b"(" + mapping(activation=text(CODE)) + b"iultralytics.nn.tasks\nDetectionModel\n",
        "ultralytics.nn.tasks.DetectionModel",
    ),
    "constructor by newobj": (
        name("ultralytics.nn.tasks", "DetectionModel") + mapping(activation=text(CODE)) + b"\x85\x81",
        "ultralytics.nn.tasks.DetectionModel",
    ),
    "method by getattr": (
        name("builtins", "getattr") + name("ultralytics.nn.tasks", "DetectionModel") + text("load") + b"\x86R",
        "getattr(ultralytics.nn.tasks.DetectionModel, 'load')",
    ),
    "globals by getattr": (
        name("builtins", "getattr") * 2 + CONV + text("forward") + b"\x86R" + text("__globals__") + b"\x86R",
        "getattr(a function, '__globals__')",
    ),
    "module attribute by getattr": (
        name("builtins", "getattr") + name("os", "path") + text("os") + b"\x86R",
        "os.path",
    ),
    "call of a resolved method": (
        name("builtins", "getattr") + CONV + text("forward") + b"\x86R)R",
        "a call of a function",
    ),
    "state of a class": (CONV + mapping(forward=text(CODE)) + b"b", "ultralytics.nn.modules.conv.Conv"),
    "slots of a class": (CONV + b"N" + mapping(forward=text(CODE)) + b"\x86b", "ultralytics.nn.modules.conv.Conv"),
    "slots of an instance": (CONV + b")\x81N" + mapping(forward=text(CODE)) + b"\x86b", "a Conv"),
    "state of a function": (
        name("builtins", "getattr") + CONV + text("forward") + b"\x86R" + mapping(x=text("")) + b"b",
        "a function",
    ),
    "class as an attribute": (
        made("ultralytics.nn.modules.conv", "Conv", float=name("ultralytics.nn.tasks", "DetectionModel")),
        "ultralytics.nn.tasks.DetectionModel as an attribute",
    ),
    "special attribute": (made("ultralytics.nn.modules.conv", "Conv", __deepcopy__=text("")), "a Conv"),
    "items of a layer": (
        made("torch.nn.modules.container", "ModuleList") + b"(" + text("x") + b"e",
        "a ModuleList",
    ),
    "keys of a layer": (
        made("torch.nn.modules.container", "ModuleDict") + text("x") + text("y") + b"s",
        "a ModuleDict",
    ),
    "persistent id": (b"Px\n", "a persistent id"),
    "persistent id of another kind": (b"(" + text("file") * 5 + b"tQ", "a persistent id"),
    "object array": (name("numpy", "dtype") + text("O8") + b"\x85R", "numpy.dtype"),
    "other codec": (name("_codecs", "encode") + text("x") + text("zlib") + b"\x86R", "_codecs.encode"),
    "control characters": (name("evil\x1b[2J", "x"), r"evil\x1b[2J.x"),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_asks_for_code_is_refused_by_name_and_runs_nothing(
    kind: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, asked = HOSTILE[kind]
    copyreg.add_extension("posix", "system", 0x77)
    before = set(sys.modules), vars(modules.Conv).copy()
    try:
        with pytest.raises(UntrustedWeightsError, match=re.escape(asked)) as caught:
            weights.load(write(Path("evil.pt"), mapping(model=body)))
    finally:
        copyreg.remove_extension("posix", "system", 0x77)
    assert "YOLOV12_TRUST_WEIGHTS=1" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("CANARY").exists()
    assert not any("no_such_package" in module or "evil" in module for module in set(sys.modules) - before[0])
    assert vars(modules.Conv) == before[1]


def test_pickle_itself_would_have_run_these_files() -> None:
    pickle.loads(HOSTILE["call"][0] + b".")
    assert Path("CANARY").exists()


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, (TOUCH,)


class AlsoEvil:
    def __reduce__(self) -> Any:
        return subprocess.check_call, (["touch", "CANARY"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_refusal_names_everything_the_file_asked_for(zipped: bool) -> None:
    inside = {"model": nn.Sequential(nn.Conv2d(1, 1, 1)), "a": [Evil()], "b": {"c": AlsoEvil()}}
    torch.save(inside, "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UntrustedWeightsError, match=r"posix\.system, subprocess\.check_call"):
        weights.load("evil.pt")
    assert not Path("CANARY").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_switch_hands_the_file_to_the_stock_loader(zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": nn.Identity(), "extra": Evil()}, "mine.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")
    checkpoint, file = weights.load("mine.pt")
    assert Path("CANARY").exists()
    assert isinstance(checkpoint["model"], nn.Identity)
    assert file == "mine.pt"
    assert weights.load("mine.pt", trusted_loader=lambda file: ({"by": "me"}, file)) == ({"by": "me"}, "mine.pt")


def test_a_tensor_may_not_be_longer_than_its_record() -> None:
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"M\x00\x10tQ"
    tensor = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00M\x00\x10\x85K\x01\x85\x89}tR"
    torch.save({"model": nn.Identity()}, "x.pt")
    with pytest.raises(WeightsError, match="another size"):
        weights.read(write_zip(Path("short.pt"), tensor, data_0=b"\0" * 16))
    assert weights.read(write_zip(Path("whole.pt"), tensor, data_0=b"\0" * 4 * 4096)).shape == (4096,)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("zipped", [True, False])
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
def test_what_ultralytics_saves_is_loaded(yaml: str, zipped: bool) -> None:
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
def mid_training() -> dict[str, Any]:
    """A checkpoint with everything Ultralytics' trainers have put into one."""
    model = YOLO("yolo12n.yaml").model
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


@pytest.mark.parametrize(
    ("body", "cls"),
    [
        (made("ultralytics.nn.modules.block", "Silence"), nn.Identity),
        (made("ultralytics.nn.modules", "Conv"), modules.Conv),
        (made("ultralytics.nn.tasks", "YOLOv10DetectionModel"), tasks.DetectionModel),
        (made("ultralytics.yolo.utils.loss", "v8DetectionLoss", x=b"N"), v8DetectionLoss),
        (name("ultralytics.yolo.utils", "IterableSimpleNamespace") + b")R}b", IterableSimpleNamespace),
        (name("pathlib", "WindowsPath") + text("runs") + text("a") + b"\x86R", type(Path())),
        (name("pathlib._local", "PosixPath") + text("/") + text("a") + b"\x86R", type(Path())),
        (name("torch", "Size") + b"(K\x01K\x02l\x85R", torch.Size),
    ],
)
def test_names_of_other_versions_and_systems(body: bytes, cls: type) -> None:
    assert type(weights.read(write_zip(Path("old.pt"), body))) is cls


def test_a_method_of_a_layer_by_name() -> None:  # what Segment and Pose of Ultralytics 8.0 to 8.2 hold
    body = name("__builtin__", "getattr") + name("ultralytics.nn.modules.head", "Detect") + text("forward") + b"\x86R"
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


def test_a_model_in_the_middle_of_a_distillation() -> None:
    from ultralytics.nn.distill_model import DistillationModel

    teacher, student = YOLO("yolo12s.yaml").model, YOLO("yolo12n.yaml").model
    teacher.args = student.args = IterableSimpleNamespace(**DEFAULT_CFG_DICT)
    saved = DistillationModel(teacher, student)
    torch.save({"ema": saved}, "last.pt")
    assert_same_weights(weights.load("last.pt")[0]["ema"], saved)


def test_a_bare_model_is_wrapped() -> None:
    model = YOLO("yolo12n.yaml").model
    torch.save(model, "bare.pt")
    assert_same_weights(weights.load("bare.pt")[0]["model"], model)


# -- files that are no checkpoints -------------------------------------------------------------------------------------


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

    with tarfile.open("w.pt", "w") as archive:
        member = tarfile.TarInfo("storages")
        member.size = len(SYSTEM) + 3
        archive.addfile(member, io.BytesIO(SYSTEM + b"\x85R."))


def _two_records_of_one_name() -> None:
    write_zip(Path("w.pt"), mapping(model=made("torch.nn.modules.linear", "Identity")), data_0=b"x", DATA_0=b"xyz")


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
        (_tar, "empty, incomplete"),
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
    torch.save({"model": nn.Identity(), "train_args": {"data": data, "imgsz": 320}}, "w.pt")
    settings = weights.load("w.pt")[0]["train_args"]
    assert settings == ({"data": data, "imgsz": 320} if kept else {"imgsz": 320})


def test_a_state_that_another_package_would_run_is_refused() -> None:
    torch.save({"model": nn.Identity(), "modelopt": {"modelopt": {}, "ranges": {}}}, "w.pt")
    with pytest.raises(UntrustedWeightsError, match="ModelOpt"):
        weights.load("w.pt")


def test_a_strangers_run_folder_cannot_smuggle_code_past_the_end_of_training(tmp_path):
    """Ultralytics strips the optimizer from best.pt at the end, loading it without any restriction."""
    from ultralytics.utils.torch_utils import strip_optimizer

    file = tmp_path / "best.pt"
    torch.save({"model": os.system}, file)
    with pytest.raises(UntrustedWeightsError, match="system"):
        strip_optimizer(file)
