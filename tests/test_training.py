"""Whole jobs on the CPU, as a user runs them: small, but on the real data set, and the real model where it matters."""

import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import SETTINGS

from yolov12 import cli, demo
from yolov12.errors import ConfigError, DataError, RankError
from yolov12.training.run.preflight import check_training_arguments
from yolov12.training.run.recipes import recipe_for

TINY = ["epochs=1", "imgsz=96", "batch=4", "fraction=0.1", "workers=0", "device=cpu"]
FEW = {"data": "demo:images=12,val=0.5", "epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "plots": False}
"""Arguments of a training on six images."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a tiny training on the embedded data set."""
    project = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "model=yolov12n.yaml", "data=demo", f"project={project}", "name=tiny", *TINY]) == 0
    return project / "tiny"


def test_training_leaves_what_ultralytics_leaves(trained):
    assert {"args.yaml", "results.csv", "results.png", "labels.jpg", "train_batch0.jpg"} <= {
        file.name for file in trained.iterdir()
    }
    assert (trained / "weights" / "best.pt").is_file()
    (row,) = csv.DictReader((trained / "results.csv").read_text().splitlines())
    assert float(row["train/cls_loss"]) > 0


def test_recipe_is_recorded(trained):
    args = yaml.safe_load((trained / "args.yaml").read_text())
    assert args["recipe"] is True
    assert (args["copy_paste"], args["warmup_bias_lr"], args["scale"]) == (0.1, 0.0, 0.5)


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("yolov12x.yaml", (), {"mosaic": 1.0, "scale": 0.9, "mixup": 0.2, "copy_paste": 0.6, "warmup_bias_lr": 0.0}),
        ("yolov12s-v1.yaml", (), {"mosaic": 1.0, "scale": 0.9, "mixup": 0.05, "copy_paste": 0.15, "warmup_bias_lr": 0}),
        ("yolov12m.yaml", ("scale", "mixup", "mosaic"), {"copy_paste": 0.4, "warmup_bias_lr": 0.0}),
        ("yolov12.yaml", (), {"mosaic": 1.0, "scale": 0.5, "mixup": 0.0, "copy_paste": 0.1, "warmup_bias_lr": 0.0}),
        ("yolo12s.yaml", (), {}),
        ("yolo11n.yaml", (), {}),
    ],
)
def test_recipe_per_scale_leaves_what_the_user_chose(name, chosen, expected):
    assert recipe_for(yaml_model_load(name), chosen)[1] == expected


class StopHereError(Exception):
    """Raised where the arguments of a training are known and its work has not begun."""


def arguments_of(model, **arguments):
    """What Ultralytics' trainer would run with."""
    seen = {}

    def trainer(overrides, _callbacks):
        seen.update(overrides)
        raise StopHereError

    with pytest.raises(StopHereError):
        model.train(trainer=trainer, data="demo", **arguments)
    return seen


def test_recipe_is_applied_to_what_the_user_has_not_set(tmp_path):
    model = YOLO("yolov12s.yaml")
    assert arguments_of(model, mixup=0.5)["mixup"] == 0.5
    assert arguments_of(model, mixup=0.5)["scale"] == 0.9
    assert "scale" not in arguments_of(model, recipe=False)
    (tmp_path / "cfg.yaml").write_text("scale: 0.1")
    from_file = arguments_of(model, cfg=str(tmp_path / "cfg.yaml"))
    assert from_file["scale"] == 0.1
    assert from_file["copy_paste"] == 0.15


def test_recipe_gives_way_to_overrides_and_reaches_a_start_that_was_no_resume():
    model = YOLO("yolov12s.yaml")
    assert arguments_of(model, resume=True)["copy_paste"] == 0.15  # Ultralytics warns, and starts anew
    model.overrides["copy_paste"] = 0.77
    assert arguments_of(model)["copy_paste"] == 0.77


def test_recipe_follows_a_checkpoint(trained):
    assert arguments_of(YOLO(trained / "weights" / "best.pt"))["copy_paste"] == 0.1


def test_val_and_predict_on_what_was_trained(trained):
    weights = trained / "weights" / "best.pt"
    assert cli.main(["val", f"model={weights}", "imgsz=64", "device=cpu", f"project={trained}", "name=val"]) == 0
    assert cli.main(["predict", f"model={weights}", "imgsz=64", f"project={trained}", "name=predict"]) == 0
    assert len(list((trained / "predict").glob("*.jpg"))) == 32  # the validation images of the demo


@pytest.mark.slow
@pytest.mark.parametrize("words", [("epochs=2",), pytest.param((), marks=pytest.mark.deep)], ids=["short", "whole"])
def test_the_first_run_finds_what_it_knew_in_parts_of_its_batch(words, run_python, tmp_path):
    """What scripts/train.sh and scripts/export.sh do without arguments. In two epochs, nothing is forgotten."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python("-m", "yolov12", "train", f"project={tmp_path}", "device=cpu", *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 2 < 180  # seconds on two cores
    run, out = tmp_path / "train", done.stdout + done.stderr
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    assert float(rows[-1]["metrics/mAP50(B)"]) >= 0.6
    classes = {row["class"]: row for row in csv.DictReader((run / "classes.csv").read_text().splitlines())}
    assert [name for name, row in classes.items() if row["known"] == "no"] == ["shifted", "crack"]
    explanation = json.loads((run / "memory.json").read_text())["explanation"]
    assert re.match(r"batch=64 did not fit into the budget of 1\.7 GiB: ran as .*, the same gradient", explanation)
    rows = csv.DictReader((run / "memory.csv").read_text().splitlines())
    assert all(len(row["micro_batches"].split()) > 1 for row in rows)
    shown = f"classes   {run / 'classes.png'}", f"memory    {run / 'memory.png'}"
    for line in (explanation, *shown, f"Next: yolov12 predict model={run}"):
        assert line in out
    assert "Freezing layer" not in out
    assert boxes_of_its_export(run / "weights" / "best.pt", 320) > 20


def test_an_export_finds_the_same_boxes(trained, tmp_path):
    """The model is made surer of what it finds than it has become in an epoch."""
    model = YOLO(trained / "weights" / "best.pt")
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0  # with its old statistics it would find the same on every image
    images = [cv2.resize(cv2.imread(str(file)), (96, 96)) for file in images_of_the_demonstration()]
    with torch.no_grad():
        model.model.train()(torch.from_numpy(np.stack(images)[..., ::-1].copy()).permute(0, 3, 1, 2) / 255)
    for scores in model.model.model[-1].cv3:
        scores[-1].weight.data *= 2
        scores[-1].bias.data += 5
    model.save(tmp_path / "sure.pt")
    assert boxes_of_its_export(tmp_path / "sure.pt", 96) > 20


def images_of_the_demonstration():
    """Those it is validated on."""
    return sorted(Path(SETTINGS["datasets_dir"]).glob("yolov12-demo*-160-*/images/val/*.jpg"))


def boxes_of_its_export(weights, imgsz):
    """How many boxes weights find on images of the demonstration: they and their export the same."""
    assert cli.main(["export", f"model={weights}", f"imgsz={imgsz}"]) == 0
    settings = {"imgsz": imgsz, "conf": 0.05, "verbose": False, "device": "cpu", "rect": False}
    torch_model, onnx_model = YOLO(weights), YOLO(weights.with_suffix(".onnx"), task="detect")
    found = 0
    for image in images_of_the_demonstration()[:8]:
        ours, theirs = (model.predict(image, **settings)[0].boxes for model in (torch_model, onnx_model))
        found += len(ours)
        # Boxes of nearly equal confidence may come in another order: each is compared with the one most like it.
        apart_px = torch.cdist(ours.xyxy, theirs.xyxy, p=torch.inf)
        apart = (ours.conf[:, None] - theirs.conf).abs()
        match = (apart_px + 100 * apart + 1e4 * (ours.cls[:, None] != theirs.cls)).argmin(1)
        assert sorted(match.tolist()) == list(range(len(theirs)))
        # A fiftieth of a pixel: rounding of an untrained network's large values moved corners by 0.008 pixels.
        assert apart_px.gather(1, match[:, None]).max() <= 0.02
        assert apart.gather(1, match[:, None]).max() <= 1e-3
        assert torch.equal(theirs.cls[match], ours.cls)
    return found


@pytest.mark.parametrize(
    "name", ["yolov12n.yaml", "yolov12n-v1.yaml", pytest.param("yolo12n.yaml", marks=pytest.mark.deep)]
)
def test_exported_graph_is_the_model_and_its_attention_is_plain(name, tmp_path):
    import onnx

    model = YOLO(name)
    model.save(tmp_path / "m.pt")
    file = YOLO(tmp_path / "m.pt").export(format="onnx", imgsz=96, dynamic=True, simplify=False)
    graph = onnx.load(file).graph
    makers = {output: node for node in graph.node for output in node.output}
    inputs = [makers.get(node.input[0]) for node in graph.node if node.op_type == "Softmax"]
    assert sum(node is not None and node.op_type == "MatMul" for node in inputs) == 8  # one an attention block
    x = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        expected = YOLO(tmp_path / "m.pt").model.eval()(x)[0]
    (out,) = onnxruntime.InferenceSession(file).run(None, {"images": x.numpy()})
    assert np.abs(out - expected.numpy()).max() < 1e-3


@pytest.mark.parametrize("name", ["yolov12n-v1.yaml", "yolo12n.yaml"])
def test_v1_and_ultralytics_own_train_too(name, tmp_path):
    model = YOLO(name)
    model.train(**FEW, project=tmp_path)
    assert "layout" not in model.model.yaml or model.model.yaml["layout"] == "v1"
    assert YOLO(model.trainer.best).val(data=FEW["data"], imgsz=64, device="cpu", project=tmp_path, plots=False)


def test_a_turbo_checkpoint_is_trained_as_turbo(trained, tmp_path):
    """What fine-tuning builds must be what was loaded, or no attention weight fits it."""
    model = YOLO(trained / "weights" / "best.pt")
    del model.model.yaml["layout"]  # as in an official file
    before = model.model.state_dict()
    model.train(**FEW, lr0=0.0, optimizer="SGD", warmup_epochs=0, project=tmp_path)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    key = "model.6.m.0.0.attn.qk.conv.weight"
    torch.testing.assert_close(before[key].float(), after[key].float(), rtol=1e-2, atol=1e-3)


def interrupted(tiny_model, tmp_path):
    """A run that failed in its second of three epochs."""

    def fail(trainer):
        if trainer.epoch == 1:
            raise RuntimeError("power cut")

    model = YOLO(tiny_model)
    model.add_callback("on_train_epoch_end", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        model.train(**{**FEW, "epochs": 3}, project=tmp_path, mixup=0.33, val=False)
    return tmp_path / "train"


def test_a_run_that_failed_keeps_its_folder_and_is_resumed_from_the_command_line(
    tiny_model, tmp_path, monkeypatch, capsys
):
    run = interrupted(tiny_model, tmp_path)
    assert (run / "weights" / "last.pt").is_file()
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path))
    assert cli.main(["train", "resume"]) == 0
    assert [folder.name for folder in tmp_path.iterdir()] == ["train"]
    assert yaml.safe_load((run / "args.yaml").read_text())["mixup"] == 0.33
    assert len((run / "results.csv").read_text().splitlines()) == 1 + 3
    capsys.readouterr()
    assert cli.main(["train", "resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert [folder.name for folder in tmp_path.iterdir()] == ["train"]


class Doubled(torch.nn.Module):
    """A layer of a user's own."""

    def forward(self, x):
        return x * 2


def test_a_users_own_layer_trains_to_the_end(tiny_model, tmp_path, monkeypatch):
    from ultralytics.nn import tasks

    monkeypatch.setitem(sys.modules, "layers_of_a_user", types.ModuleType("layers_of_a_user"))
    monkeypatch.setattr(Doubled, "__module__", "layers_of_a_user")
    sys.modules["layers_of_a_user"].Doubled = Doubled
    monkeypatch.setattr(tasks, "Doubled", Doubled, raising=False)
    own = yaml.safe_load(Path(tiny_model).read_text())
    own["head"] = [[-1, 1, "Doubled", []], [[-1, 5], 1, "Concat", [1]], [[3, 4, -1], 1, "Detect", ["nc"]]]
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    model = YOLO(tmp_path / "own.yaml")
    model.train(**FEW, project=tmp_path)
    assert any(isinstance(layer, Doubled) for layer in YOLO(model.trainer.best).model.modules())


# -- what users get wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path):
    """A small ordinary data set to break."""
    yaml_file = demo.ensure("demo:images=8,val=0.25", Path(SETTINGS["datasets_dir"]))
    shutil.copytree(yaml_file.parent, tmp_path / "data")
    return tmp_path / "data"


def train(capsys, tmp_path, *words, model="yolov12n.yaml"):
    """Exit status, last line on stderr, and whether a run folder was left."""
    status = cli.main(["train", f"model={model}", f"project={tmp_path / 'runs'}", *TINY[:3], "device=cpu", *words])
    lines = capsys.readouterr().err.strip().splitlines() or [""]
    runs = tmp_path / "runs"
    return status, lines[-1], runs.exists() and any(runs.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=missing.yaml"], "data=missing.yaml: 'missing.yaml' does not exist. Give the path of a data set yaml"),
        (["data=demo", "bathc=4"], "unknown argument 'bathc'. Did you mean 'batch'?"),
        (["data=demo", "imgsz=abc"], "imgsz=abc is not an image size"),
        (["data=demo", "device=7"], "device=7: "),
        (["data=demo:imagse=9"], "data=demo has no setting 'imagse' (did you mean images?)"),
        (["data=demo", "replay=demo:hold_back=foo"], "replay=demo: hold_back='foo' must be True, False"),
        (["data=demo", "epochs=ten"], "'epochs=ten' is of invalid type str"),
        (["data=demo", "model=nothing.pt"], "nothing.pt does not exist"),
        (
            ["data=demo", "model=yolov12q.yaml"],
            "'yolov12q.yaml' does not exist. Check the path, or use the name of a model",
        ),
        (["data=demo", "cfg=missing.yaml"], "'missing.yaml' does not exist. Check the path"),
        (["data=demo", "batch=0"], "batch=0: give a number of images, as in 16, or -1"),
        (["data=demo", "batch=-2"], "batch=-2: give a number of images, as in 16, or -1"),
    ],
)
def test_bad_arguments_end_in_one_line_and_leave_nothing(capsys, tmp_path, words, message):
    status, line, left = train(capsys, tmp_path, *words)
    assert (status, left) == (2, False)
    assert line.startswith("yolov12: error: ")
    assert message in line


def test_what_ultralytics_accepts_is_accepted(tmp_path, data_set):
    """Linked folders, another split for validation, sizes as text or too many, and batches for AutoBatch."""
    train_images = data_set / "images" / "train"
    train_images.rename(tmp_path / "camera")
    train_images.mkdir()
    (train_images / "linked").symlink_to(tmp_path / "camera")
    data = yaml.safe_load((data_set / "data.yaml").read_text())
    (data_set / "test.yaml").write_text(json.dumps({**data, "val": "nothing/here", "test": "images/val"}))
    for imgsz in (64, "64", [64], [64, 64, 3]):
        check_training_arguments({"data": str(data_set / "test.yaml"), "split": "test", "imgsz": imgsz}, "detect")
    for batch in (16, 0.7, -1):
        check_training_arguments({"batch": batch}, "detect")


def test_a_data_set_without_validation_says_so(tmp_path, data_set):
    data = yaml.safe_load((data_set / "data.yaml").read_text())
    (data_set / "data.yaml").write_text(json.dumps({**data, "val": None}))
    with pytest.raises(DataError, match="'val:'"):
        check_training_arguments({"data": str(data_set / "data.yaml")}, "detect")


@pytest.mark.parametrize("key", ["data", "replay"])
@pytest.mark.parametrize("change", [{"path": "/nope/here"}, {"train": "none/here", "val": "none/here"}, {"val": None}])
def test_a_yaml_with_wrong_paths_is_to_be_corrected(data_set, key, change):
    described = data_set / "broken.yaml"
    content = {**yaml.safe_load((data_set / "data.yaml").read_text()), **change}
    described.write_text(json.dumps({**content, "train": content["val"]} if key == "replay" else content))
    words = {"data": str(data_set / "data.yaml"), key: str(described)}
    with pytest.raises(DataError) as refused:
        check_training_arguments(words, "detect")
    assert str(refused.value).endswith(f"Correct 'path:' and the splits in {described}")


def test_a_start_that_fails_leaves_the_users_files(tmp_path):
    """`save_dir` may be a folder with more in it."""

    def fail(trainer):
        raise RuntimeError("no disk")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    model = YOLO("yolov12n.yaml")
    model.add_callback("on_pretrain_routine_end", fail)
    with pytest.raises(RuntimeError, match="no disk"):
        model.train(data="demo", save_dir=str(tmp_path / "mine"), epochs=1, imgsz=64, device="cpu", plots=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"


def test_a_run_whose_processes_did_the_work_is_kept(tmp_path, monkeypatch):
    """With several GPUs the parent sees no epoch: its children do, and one may die late."""
    from ultralytics.engine import trainer as module

    model = YOLO("yolov12n.yaml")
    trainer = model._smart_load("trainer")(
        overrides={"model": "yolov12n.yaml", "data": "demo", "device": "cpu", "project": str(tmp_path), "mode": "train"}
    )
    trainer.ddp, trainer.world_size = True, 2

    def run(cmd, check):
        (trainer.wdir).mkdir(parents=True, exist_ok=True)
        (trainer.wdir / "last.pt").write_bytes(b"fifty epochs")
        raise subprocess.CalledProcessError(1, cmd)

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "generate_ddp_command", lambda trainer: (["python"], str(tmp_path / "file")))
    with pytest.raises(RankError, match="exit status 1"):
        trainer.train()
    assert (trainer.wdir / "last.pt").read_bytes() == b"fifty epochs"


def test_a_constructor_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError, match="nothere"):
        YOLO("yolo11n-cls.yaml").train(data=str(tmp_path / "nothere"), project=tmp_path / "runs", device="cpu")
    assert not any((tmp_path / "runs").rglob("*"))


def test_empty_data_set(capsys, tmp_path, data_set):
    for image in (data_set / "images" / "train").iterdir():
        image.unlink()
    status, line, left = train(capsys, tmp_path, f"data={data_set / 'data.yaml'}")
    assert (status, left) == (2, False)
    assert "no images for 'train' in" in line


def test_a_list_of_images_that_is_no_utf_8(capsys, tmp_path, data_set):
    listed = data_set / "train.txt"
    listed.write_bytes("./images/train/café.jpg\n".encode("latin-1"))
    described = data_set / "data.yaml"
    described.write_text(yaml.safe_dump({**yaml.safe_load(described.read_text()), "train": listed.name}))
    status, line, left = train(capsys, tmp_path, f"data={described}")
    assert (status, left) == (2, False)
    assert str(listed) in line
    assert "UTF-8" in line
    with pytest.raises(FileNotFoundError):  # as from Ultralytics
        check_training_arguments({"data": str(described)}, "detect")


def test_what_a_data_set_lacks_is_named(data_set):
    described = data_set / "data.yaml"
    content = yaml.safe_load(described.read_text())
    described.write_text(yaml.safe_dump({key: content[key] for key in content if key not in ("names", "nc")}))
    with pytest.raises(DataError, match="either 'names' or 'nc' are required"):  # in the second line of Ultralytics
        check_training_arguments({"data": str(described)}, "detect")


def test_data_set_without_a_usable_label(capsys, tmp_path, data_set):
    for label in (data_set / "labels" / "train").iterdir():
        label.write_text("99 0.5 0.5 0.1 0.1\n")
    status, line, left = train(capsys, tmp_path, f"data={data_set / 'data.yaml'}")
    assert (status, left) == (1, False)
    assert "No valid images found" in line


def test_one_bad_label_and_one_truncated_image_are_skipped_and_reported(capsys, caplog, tiny_model, tmp_path, data_set):
    images = sorted((data_set / "images" / "train").iterdir())
    (data_set / "labels" / "train" / images[0].with_suffix(".txt").name).write_text("99 0.5 0.5 0.1 0.1\n")
    data = images[1].read_bytes()
    images[1].write_bytes(data[: len(data) // 3])
    status, _, left = train(capsys, tmp_path, f"data={data_set / 'data.yaml'}", "plots=False", model=tiny_model)
    assert (status, left) == (0, True)
    assert "Label class 99 exceeds dataset class count 10" in caplog.text
    assert images[1].name in caplog.text


def test_weights_that_run_code(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    status, line, left = train(capsys, tmp_path, "data=demo", f"model={tmp_path / 'evil.pt'}")
    assert (status, left) == (2, False)
    assert "system" in line
    assert "YOLOV12_TRUST_WEIGHTS=1" in line
    assert not (tmp_path / "ran").exists()


def test_errors_reach_python_callers_as_exceptions():
    model = YOLO("yolov12n.yaml")
    with pytest.raises(DataError, match=r"missing\.yaml"):
        model.train(data="missing.yaml")
    with pytest.raises(ConfigError, match="imgsz"):
        model.train(data="demo", imgsz="abc")
