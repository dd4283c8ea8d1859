"""The command `yolov12 plan`: output and exit status."""

import ctypes
import json
import re

import pytest
import scipy.optimize

from yolov12 import cli

SMALL = ["plan", "model=yolov12n.yaml", "imgsz=100", "boxes=5", "batch=8"]


def test_table(capsys):
    assert cli.main([*SMALL, "gpu=t4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("128x128, batch 8, up to 5 boxes an image, half precision\nattention: memory-efficient")
    for row in ("weights", "gradients", "optimizer (MuSGD)", "an image keeps", "predicted peak", "budget"):
        assert f"\n{row}" in out
    assert out.splitlines()[-1].startswith("yolov12n.yaml fits: ")
    assert out.splitlines()[-1].endswith("12.7 GiB of a T4 may be used; all activations kept.")


def test_sizes_below_one_gib_are_in_mib(capsys):
    assert cli.main([*SMALL, "mem=50MiB"]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert re.search(
        r"does not fit: 1 image at once needs \d\d+(\.\d)? MiB with .*, 45 MiB of 50 MiB may be used\.$", verdict
    )
    assert cli.main([*SMALL, "mem=1.5GiB"]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r" fits: \d\d+(\.\d)? MiB at the peak, 1\.3 GiB of 1\.5 GiB may be used;", verdict)


def test_several_models_are_planned_at_once_in_the_order_of_the_command_and_say_how_far_it_is(capfd):
    models = ["yolov12n.yaml", "yolo11n.yaml"]
    assert cli.main(["plan", f"model={','.join(models)}", *SMALL[2:], "mem=16GiB", "--json"]) == 0
    out, err = capfd.readouterr()
    assert [plan["model"] for plan in json.loads(out)["plans"]] == models
    planned = [line.split(" planned, ") for line in err.splitlines() if " planned, " in line]
    assert sorted(name for name, _ in planned) == sorted(models)
    assert [count for _, count in planned] == ["1 of 2", "2 of 2"]


def test_json_is_all_that_is_on_stdout_and_says_what_does_not_fit(capfd, monkeypatch):
    """SciPy's solver prints a line from C++ for a few problems."""
    milp = scipy.optimize.milp

    def loud(*args, **kwargs):
        ctypes.CDLL(None).puts(b"tmpSolver.run();")
        return milp(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", loud)
    assert cli.main([*SMALL, "mem=50MiB", "optimizer=sgd", "--json"]) == 1
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert "tmpSolver.run();" not in out + err
    (plan,) = json.loads(out)["plans"]
    assert plan["fits"] is False
    assert plan["micro_batch"] == 1
    assert plan["peak_bytes"] > plan["budget_bytes"] == int(0.9 * 50 * 2**20)
    assert plan["fixed"]["optimizer"] == "SGD"
    assert plan["fixed"]["accumulates"] is True
    assert plan["levers"]["recomputed_bytes"] < plan["levers"]["rebuilt_bytes"] < plan["levers"]["kept_bytes"]
    assert plan["recompute"]
    assert plan["plan"].startswith(("rebuild ", "recompute "))


def test_what_cannot_be_planned_is_one_line(capsys, tmp_path):
    assert cli.main(["plan", "model=yolov12n.yaml", "mem=16GiB", "gpuu=T4"]) == 2
    assert cli.main(["plan", "model=yolo11n-seg.yaml", "mem=16GiB"]) == 2
    assert cli.main([*SMALL, "mem=16GiB", "disable_mas_layers=backbon.4"]) == 2
    assert cli.main(["plan", "model=nothing", "mem=16GiB"]) == 2
    *errors, missing = capsys.readouterr().err.splitlines()
    assert missing.endswith("'nothing' does not exist. Check the path, or use the name of a model, as in yolov12s.yaml")
    assert [line.startswith("yolov12: error: ") for line in errors[-3:]] == [True] * 3
    assert "SegmentationModel" in errors[-2]
    assert "Did you mean backbone.4" in errors[-1]


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("best.onnx", "Add format=onnx to plan this graph"),
        ("best.torchscript", "Give its yaml or weight file"),
        ("best.engine", "Give its yaml or weight file"),
    ],
)
def test_an_exported_model_is_no_training_and_the_way_out_is_named(capsys, tmp_path, name, way_out):
    (tmp_path / name).touch()
    assert cli.main(["plan", f"model={tmp_path / name}", "mem=20MiB"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"yolov12: error: model={tmp_path / name} is an exported model, which cannot be trained. {way_out}"


def test_help(capsys):
    assert cli.main(["plan", "--help"]) == 0
    assert "gpu=T4 or mem=16GiB" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["format=onnx"]])
def test_help_names_every_exit_status(capsys, words):
    assert cli.main(["plan", *words, "--help"]) == 0
    status = " ".join(capsys.readouterr().out.split()).partition("The exit status is ")[2]
    assert [word for word in status.replace(",", "").split() if word in ("0", "1", "2")] == ["0", "1", "2"]
