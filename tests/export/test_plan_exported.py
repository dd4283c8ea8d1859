"""`yolov12 plan format=onnx`: what an exported graph takes, and how it would be split."""

import json

import pytest

from yolov12.cli import main
from yolov12.export import graph

MIB = 2**20


def _plan(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["plan", "format=onnx", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_file_is_planned_as_it_is(capsys, static_file, planned):
    code, out, _ = _plan(capsys, f"model={static_file}", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["unsplit"]["tensors_bytes"] == planned(graph.load(static_file), (1, 3, 640, 640)).peak_bytes
    assert facts["input"] == [1, 3, 640, 640]
    assert "split" not in facts


def test_a_limit_shows_the_splits(capsys, static_file):
    code, out, _ = _plan(capsys, f"model={static_file}", "mem=76MiB")
    assert code == 0
    assert "tensors at the peak" in out
    assert "by rows: 2 parts" in out
    code, out, _ = _plan(capsys, f"model={static_file}", "mem=1GiB")
    assert "nothing is split" in out


def test_what_does_not_fit_is_exit_status_1(capsys, static_file):
    code, out, _ = _plan(capsys, f"model={static_file}", "mem=20MiB", "json")
    assert code == 1
    assert "needs" in json.loads(out)["problem"]


def test_a_model_is_exported_and_leaves_nothing_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = _plan(capsys, "model=yolov12n.yaml", "imgsz=160", "dynamic=True", "batch=2", "json")
    assert code == 0
    assert json.loads(out)["input"] == [2, 3, 320, 320]  # dynamic: up to twice imgsz
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["model=a.onnx", "imgzs=640"], "Did you mean 'imgsz'?"),
        (["imgsz=640"], "no model= given"),
        (["model=a.onnx", "imgsz=big"], "imgsz=big: give a number"),
        (["model=a.onnx", "mem=0.5"], "Give bytes"),
        (["model=a.onnx", "dynamic=perhaps"], "give True or False"),
        (["model=none.onnx"], "none.onnx cannot be read"),
    ],
)
def test_bad_arguments(capsys, words, problem):
    code, _, err = _plan(capsys, *words)
    assert code == 2
    assert problem in err


def test_another_format_is_not_planned(capsys):
    assert main(["plan", "format=openvino", "model=a.onnx"]) == 2
    assert "plans are made for onnx" in capsys.readouterr().err


def test_help_says_what_there_is(capsys):
    assert main(["plan", "format=onnx", "--help"]) == 0
    assert "dynamic=True" in capsys.readouterr().out


_IMPORTED = "print(sorted({'torch', 'ultralytics', 'onnxruntime', 'yolov12.mas'} & set(sys.modules)), file=sys.stderr)"


@pytest.mark.parametrize("module", ["budget", "graph", "rewrite"])
def test_arithmetic_on_a_plan_imports_neither_torch_nor_ultralytics(run_python, module):
    done = run_python("-c", f"import sys, yolov12.export.{module}; {_IMPORTED}")
    assert done.stderr.splitlines() == ["[]"]


def test_planning_an_onnx_file_imports_neither_torch_nor_ultralytics(run_python, static_file):
    words = ["plan", "format=onnx", f"model={static_file}", "mem=76MiB", "json"]
    done = run_python(
        "-c", f"import sys; from yolov12.cli import main; code = main({words}); {_IMPORTED}; sys.exit(code)"
    )
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["[]"]
    assert json.loads(done.stdout)["split"]["splits"]
