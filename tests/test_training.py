"""Whole jobs on the CPU, as a user runs them: small, but the real model on the real data set."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.utils import SETTINGS

from yolov12 import cli, demo
from yolov12.errors import ConfigError, DataError
from yolov12.training.recipes import recipe_for

TINY = ["epochs=1", "imgsz=96", "batch=4", "fraction=0.1", "workers=0", "device=cpu"]


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


def test_recipe_is_recorded_and_resumes(trained):
    args = yaml.safe_load((trained / "args.yaml").read_text())
    assert args["recipe"] is True
    assert (args["copy_paste"], args["warmup_bias_lr"], args["scale"]) == (0.1, 0.0, 0.5)


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("yolov12x.yaml", (), {"mosaic": 1.0, "scale": 0.9, "mixup": 0.2, "copy_paste": 0.6, "warmup_bias_lr": 0.0}),
        ("yolov12s-v1.yaml", (), {"mosaic": 1.0, "scale": 0.9, "mixup": 0.05, "copy_paste": 0.15, "warmup_bias_lr": 0}),
        ("yolov12m.yaml", ("scale", "mixup", "mosaic"), {"copy_paste": 0.4, "warmup_bias_lr": 0.0}),
        ("yolo12s.yaml", (), {}),
        ("yolo11n.yaml", (), {}),
    ],
)
def test_recipe_per_scale_leaves_what_the_user_chose(name, chosen, expected):
    assert recipe_for(YOLO(name).model.yaml, chosen) == expected


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


def test_recipe_follows_a_checkpoint(trained):
    assert arguments_of(YOLO(trained / "weights" / "best.pt"))["copy_paste"] == 0.1


def test_val_and_predict_on_what_was_trained(trained):
    weights = trained / "weights" / "best.pt"
    assert cli.main(["val", f"model={weights}", "imgsz=64", "device=cpu", f"project={trained}", "name=val"]) == 0
    assert cli.main(["predict", f"model={weights}", "imgsz=64", f"project={trained}", "name=predict"]) == 0
    assert len(list((trained / "predict").glob("*.jpg"))) == 32  # the validation images of the demo


@pytest.mark.slow
def test_demonstration_learns_and_its_export_finds_the_same_boxes(tmp_path):
    """What scripts/train.sh and scripts/export.sh do without arguments."""
    assert cli.main(["train", f"project={tmp_path}"]) == 0
    run = tmp_path / "train"
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    assert float(rows[-1]["metrics/mAP50(B)"]) > 0
    assert float(rows[-1]["train/cls_loss"]) < 0.7 * float(rows[0]["train/cls_loss"])

    weights = run / "weights" / "best.pt"
    assert cli.main(["export", f"model={weights}", "imgsz=256"]) == 0
    images = sorted(Path(SETTINGS["datasets_dir"]).glob("yolov12-demo*-160-*/images/val/*.jpg"))[:8]
    settings = {"imgsz": 256, "conf": 0.05, "verbose": False, "device": "cpu", "rect": False}
    torch_model, onnx_model = YOLO(weights), YOLO(weights.with_suffix(".onnx"), task="detect")
    found = 0
    for image in images:
        ours, theirs = (model.predict(image, **settings)[0].boxes for model in (torch_model, onnx_model))
        found += len(ours)
        torch.testing.assert_close(theirs.xyxy, ours.xyxy, rtol=0, atol=1e-3)  # pixels
        torch.testing.assert_close(theirs.conf, ours.conf, rtol=0, atol=1e-3)
        assert torch.equal(theirs.cls, ours.cls)
    assert found > 20


@pytest.mark.parametrize("name", ["yolov12n.yaml", "yolov12n-v1.yaml", "yolo12n.yaml"])
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
    model.train(data="demo", epochs=1, imgsz=64, batch=4, fraction=0.05, device="cpu", project=tmp_path, plots=False)
    assert "layout" not in model.model.yaml or model.model.yaml["layout"] == "v1"
    assert YOLO(model.trainer.best).val(data="demo", imgsz=64, device="cpu", project=tmp_path, plots=False)


def test_a_turbo_checkpoint_is_trained_as_turbo(trained, tmp_path):
    """What fine-tuning builds must be what was loaded, or no attention weight fits it."""
    model = YOLO(trained / "weights" / "best.pt")
    del model.model.yaml["layout"]  # as in an official file
    before = model.model.state_dict()
    model.train(data="demo", epochs=1, imgsz=64, batch=4, fraction=0.05, lr0=0.0, optimizer="SGD", project=tmp_path,
                device="cpu", plots=False, warmup_epochs=0)  # fmt: skip
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    key = "model.6.m.0.0.attn.qk.conv.weight"
    torch.testing.assert_close(before[key].float(), after[key].float(), rtol=1e-2, atol=1e-3)


# -- what users get wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path):
    """A small ordinary data set to break."""
    yaml_file = demo.ensure("demo:images=8,val=0.25", Path(SETTINGS["datasets_dir"]))
    shutil.copytree(yaml_file.parent, tmp_path / "data")
    return tmp_path / "data"


def train(capsys, tmp_path, *words):
    """Exit status, last line on stderr, and whether a run folder was left."""
    status = cli.main(["train", "model=yolov12n.yaml", f"project={tmp_path / 'runs'}", *TINY[:3], "device=cpu", *words])
    lines = capsys.readouterr().err.strip().splitlines() or [""]
    runs = tmp_path / "runs"
    return status, lines[-1], runs.exists() and any(runs.iterdir())


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["data=missing.yaml"],
            1,
            "data=missing.yaml: 'missing.yaml' does not exist. Give the path of a data set yaml",
        ),
        (["data=demo", "bathc=4"], 2, "unknown argument 'bathc'. Did you mean 'batch'?"),
        (["data=demo", "imgsz=abc"], 2, "imgsz=abc is not an image size"),
        (["data=demo", "device=7"], 2, "device=7: "),
        (["data=demo:imagse=9"], 2, "images"),
        (["data=demo", "epochs=ten"], 1, "'epochs=ten' is of invalid type str"),
        (["data=demo", "model=nothing.pt"], 1, "nothing.pt does not exist"),
        (["data=demo", "model=yolov12q.yaml"], 1, "yolov12q.yaml"),
    ],
)
def test_bad_arguments_end_in_one_line_and_leave_nothing(capsys, tmp_path, words, status, message):
    got = train(capsys, tmp_path, *words)
    assert got[0] == status
    assert got[1].startswith("yolov12: error: ")
    assert message in got[1]
    assert not got[2]


def test_empty_data_set(capsys, tmp_path, data_set):
    for image in (data_set / "images" / "train").iterdir():
        image.unlink()
    status, line, left = train(capsys, tmp_path, f"data={data_set / 'data.yaml'}")
    assert (status, left) == (1, False)
    assert "no images for 'train' in" in line


def test_data_set_without_a_usable_label(capsys, tmp_path, data_set):
    for label in (data_set / "labels" / "train").iterdir():
        label.write_text("99 0.5 0.5 0.1 0.1\n")
    status, line, left = train(capsys, tmp_path, f"data={data_set / 'data.yaml'}")
    assert (status, left) == (1, False)
    assert "No valid images found" in line


def test_one_bad_label_and_one_truncated_image_are_skipped_and_reported(capsys, caplog, tmp_path, data_set):
    images = sorted((data_set / "images" / "train").iterdir())
    (data_set / "labels" / "train" / images[0].with_suffix(".txt").name).write_text("99 0.5 0.5 0.1 0.1\n")
    data = images[1].read_bytes()
    images[1].write_bytes(data[: len(data) // 3])
    status, _, left = train(capsys, tmp_path, f"data={data_set / 'data.yaml'}")
    assert (status, left) == (0, True)
    assert "Label class 99 exceeds dataset class count 10" in caplog.text
    assert images[1].name in caplog.text


def test_weights_that_run_code(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    status, line, left = train(capsys, tmp_path, "data=demo", f"model={tmp_path / 'evil.pt'}")
    assert (status, left) == (1, False)
    assert "system" in line
    assert "YOLOV12_TRUST_WEIGHTS=1" in line
    assert not (tmp_path / "ran").exists()


def test_errors_reach_python_callers_as_exceptions():
    model = YOLO("yolov12n.yaml")
    with pytest.raises(DataError, match=r"missing\.yaml"):
        model.train(data="missing.yaml")
    with pytest.raises(ConfigError, match="imgsz"):
        model.train(data="demo", imgsz="abc")


def test_a_run_that_fails_later_keeps_its_folder(tmp_path):
    """Only a start that never came to an epoch is cleared away."""

    def fail(trainer):
        raise RuntimeError("disk full")

    model = YOLO("yolov12n.yaml")
    model.add_callback("on_train_epoch_end", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        model.train(
            data="demo", epochs=1, imgsz=64, batch=4, fraction=0.05, device="cpu", project=tmp_path, plots=False
        )
    assert (tmp_path / "train" / "args.yaml").is_file()
