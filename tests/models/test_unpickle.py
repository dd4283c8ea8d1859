from __future__ import annotations

import copyreg
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from ultralytics.nn import modules

from yolov12.errors import UntrustedWeightsError, WeightsError
from yolov12.models import weights

# These functions write pickle opcodes, for pickles that `pickle.dumps` does not write.


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def made(module: str, attribute: str, **state: bytes) -> bytes:
    """Write the opcodes that create an instance without `__init__` and set attributes."""
    return name(module, attribute) + b")\x81" + mapping(**state) + b"b"


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


@pytest.fixture
def write_legacy() -> Callable[..., Path]:
    """Write the older format of `torch.save`, which is not an archive."""

    def write(path: Path, body: bytes) -> Path:
        head = b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}))
        path.write_bytes(head + b"\x80\x02" + body + b"." + pickle.dumps([], 2))
        return path

    return write


@pytest.mark.parametrize("write", ["write_zip", "write_legacy"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_asks_for_code_is_refused_by_name_and_runs_nothing(
    kind: str, write: str, request: pytest.FixtureRequest
) -> None:
    body, asked = HOSTILE[kind]
    copyreg.add_extension("posix", "system", 0x77)
    before = set(sys.modules), vars(modules.Conv).copy()
    try:
        with pytest.raises(UntrustedWeightsError, match=re.escape(asked)) as caught:
            weights.load(request.getfixturevalue(write)(Path("evil.pt"), mapping(model=body)))
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


def test_a_tensor_may_not_be_longer_than_its_record(write_zip: Callable[..., Path]) -> None:
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"M\x00\x10tQ"
    tensor = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00M\x00\x10\x85K\x01\x85\x89}tR"
    torch.save({"model": nn.Identity()}, "x.pt")
    with pytest.raises(WeightsError, match="another size"):
        weights.read(write_zip(Path("short.pt"), tensor, data_0=b"\0" * 16))
    assert weights.read(write_zip(Path("whole.pt"), tensor, data_0=b"\0" * 4 * 4096)).shape == (4096,)
