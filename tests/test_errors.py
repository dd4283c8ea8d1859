"""Errors are also of the type that Ultralytics raises in their place, and the drawing of the tree is true."""

import json
import re
from pathlib import Path

import pytest
from ultralytics.utils import SETTINGS

from yolov12 import demo, errors

_TABLE = """
import json, sys
from pathlib import Path
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.torch_utils import strip_optimizer

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
model = settings.pop("model")
folder.mkdir()

def written(name, content):
    (folder / name).write_bytes(content)
    return str(folder / name)

def saved(name, thing):
    torch.save(thing, folder / name)
    return str(folder / name)

def data(**changes):
    keys = {"path": str(folder), "train": "images", "val": "images", "names": {0: "part"}, **changes}
    return written("data.yaml", json.dumps({k: v for k, v in keys.items() if v is not None}).encode())

def train(**changes):
    YOLO(model).train(**{**settings, "project": str(folder / "runs"), **changes})

(folder / "images").mkdir()
whole = str(folder / "whole.pt")
YOLO(model).save(whole)
torch.jit.script(torch.nn.Identity()).save(str(folder / "script.pt"))
CASES = {
    "missing weights": lambda: YOLO("missing.pt"),
    "missing weights by path": lambda: YOLO("/missing/last.pt"),
    "empty weights": lambda: YOLO(written("empty.pt", b"")),
    "text as weights": lambda: YOLO(written("text.pt", b"hello")),
    "weights that are cut off": lambda: YOLO(written("cut.pt", Path(whole).read_bytes()[:-9999])),
    "state dict": lambda: YOLO(saved("state.pt", torch.nn.Linear(2, 2).state_dict())),
    "TorchScript": lambda: YOLO(str(folder / "script.pt")),
    "missing weights to load": lambda: YOLO(model).load("missing.pt"),
    "other suffix": lambda: load_checkpoint(written("weights.txt", b"")),
    "missing pretrained weights": lambda: train(pretrained="missing.pt"),
    "weights to strip": lambda: strip_optimizer(written("text.pt", b"hello")),
    "no model to strip": lambda: strip_optimizer(saved("state.pt", {"a": torch.zeros(1)})),
    "resume from no checkpoint": lambda: train(resume=written("text.pt", b"hello")),
    "resume from a complete run": lambda: train(resume=whole),
    "missing data": lambda: train(data="missing.yaml"),
    "data that is no yaml": lambda: train(data=written("data.txt", b"a")),
    "malformed data": lambda: train(data=written("malformed.yaml", b"a: [")),
    "data without val": lambda: train(data=data(val=None)),
    "data without names": lambda: train(data=data(names=None)),
    "data without images": lambda: train(data=data()),
    "image size of another type": lambda: train(imgsz=64.5),
    "no image size": lambda: train(imgsz=None),
    "text as image size": lambda: train(imgsz="big"),
    "missing device": lambda: train(device=99),
    "text as batch": lambda: train(batch="x"),
    "unknown argument": lambda: train(epohcs=1),
    "unknown argument of val": lambda: YOLO(whole).val(epohcs=1),
    "missing data of val": lambda: YOLO(whole).val(data="missing.yaml", device="cpu"),
}
found = {}
for name, run in CASES.items():
    try:
        run()
        found[name] = []
    except Exception as error:
        found[name] = [each.__name__ for each in type(error).__mro__]
Path(sys.argv[3]).write_text(json.dumps(found))
"""


def test_errors_are_of_the_type_of_ultralytics(run_python, tiny_model, tmp_path):
    settings = {"model": tiny_model, "imgsz": 64, "epochs": 1, "workers": 0, "plots": False, "device": "cpu"}
    settings["data"] = str(demo.ensure("demo:images=40,val=0.2", Path(SETTINGS["datasets_dir"])))
    found = []
    for patched in ("0", "1"):
        folder, file = tmp_path / patched, tmp_path / f"{patched}.json"
        done = run_python("-c", _TABLE, str(folder), json.dumps(settings), str(file), YOLOV12_AUTOPATCH=patched)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(file.read_text()))
    stock, ours = found
    assert {name: stock[name][:1] for name in stock} == {
        name: [each for each in stock[name][:1] if each in ours[name]] for name in stock
    }
    assert sum("YOLOv12Error" in each for each in ours.values()) > 12


LINE = re.compile(r"^([│ ]*)[├└]── (\w+) +(.+)$", re.MULTILINE)


def test_the_drawing_of_the_tree_is_true():
    parents, drawn = ["YOLOv12Error"], set()
    for indent, name, text in LINE.findall(errors.__doc__):
        depth = len(indent) // 4 + 1
        parents[depth:] = [name]
        others = re.search(r"\(also an? (\w+)(?: and an? (\w+))?\)", text)
        bases = [parents[depth - 1], *(filter(None, others.groups()) if others else ())]
        assert [base.__name__ for base in getattr(errors, name).__bases__] == bases
        drawn.add(name)
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert drawn == classes - {"YOLOv12Error"}


@pytest.mark.parametrize("kind", [errors.RankError, errors.DoesNotFitError])
def test_an_error_of_ours_is_no_failed_allocation(kind):
    """It ends a run, while a failed allocation is tried again in a smaller shape."""
    from yolov12.mas.oom import is_out_of_memory

    error = kind("rank 1: CUDA out of memory")
    assert not is_out_of_memory(error)
