"""Engines are built inside limits. The library is TensorRT-RTX, which builds without a GPU and is no TensorRT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from yolov12 import YOLO
from yolov12.errors import ConfigError, DoesNotFitError, ExportError
from yolov12.export import budget, engine, graph

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is for x86-64")

MIB = 2**20


@pytest.fixture(scope="module")
def library() -> engine.Library:
    return engine.find("tensorrt_rtx")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _export(**arguments) -> Path:
    arguments = {"format": "engine", "engine_builder": "tensorrt_rtx", "verbose": False, **arguments}
    return Path(YOLO(arguments.pop("model", "yolov12n.yaml")).export(**arguments))


def _journal(file: Path) -> list[dict]:
    return json.loads(file.with_suffix(".export.json").read_text())


def _metadata(file: Path) -> dict:
    from ultralytics.nn.backends.base import BaseBackend

    return BaseBackend.read_metadata(file)


@pytest.mark.parametrize(
    ("model", "imgsz", "limit_mib", "too_little_mib"),
    [
        ("yolov12n.yaml", 1600, 256, 320),
        pytest.param("yolov12m.yaml", 1280, 256, 512, marks=[pytest.mark.slow, pytest.mark.deep]),
    ],
)
def test_an_engine_fits_where_the_unsplit_graph_does_not(folder, library, model, imgsz, limit_mib, too_little_mib):
    """The workspace in which the split graph builds is smaller than one that is too small for the unsplit graph."""
    file = _export(model=model, imgsz=imgsz, workspace=limit_mib / 1024)
    plan, attempt = _journal(file)
    assert attempt["outcome"] == "built"
    assert attempt["workspace_bytes"] == limit_mib * MIB
    assert plan["tensors_bytes"] < limit_mib * MIB < plan["tensors_unsplit_bytes"]
    assert len(plan["splits"]) > 4
    metadata = _metadata(file)
    assert metadata["imgsz"] == [imgsz, imgsz]
    assert metadata["engine_builder"].startswith("TensorRT-RTX 1.")
    assert file.stat().st_size > {"n": 9, "m": 70}[model[7]] * MIB
    onnx_file = Path(YOLO(model).export(format="onnx", imgsz=imgsz, verbose=False))
    job = engine.Job(onnx_file, folder / "unsplit.engine", (1, 3, imgsz, imgsz))
    (attempt,) = engine.build(library, job, too_little_mib * MIB, engine.EFFORTS[:1])
    assert attempt.outcome == "out of memory"
    assert not job.engine.exists()


def test_arguments_mean_what_they_mean_upstream(folder):
    whole = _export(imgsz=160, batch=2, dynamic=True)
    assert _metadata(whole)["batch"] == 2
    assert _metadata(whole)["args"]["dynamic"] is True
    plan = _journal(whole.rename("whole.engine").with_name("yolov12n.engine"))
    assert plan[-1]["outcome"] == "built"
    half = _export(imgsz=160, half=True)
    assert _metadata(half)["args"]["quantize"] == 16
    assert half.stat().st_size < 0.7 * Path("whole.engine").stat().st_size
    types = {each.data_type for each in onnx.load("yolov12n.onnx").graph.initializer if len(each.dims) == 4}
    assert types == {onnx.TensorProto.FLOAT16}


def test_an_engine_for_any_size_is_planned_for_its_largest(folder):
    file = _export(imgsz=640, dynamic=True, mem_limit="240MiB")
    plan, *attempts = _journal(file)
    assert plan["tensors_bytes"] < 165 * MIB < 170 * MIB < plan["tensors_unsplit_bytes"]  # of images of 1280
    assert plan["limit_bytes"] == 240 * MIB
    assert attempts[-1]["outcome"] == "built"
    assert attempts[-1]["workspace_bytes"] == 240 * MIB


def test_an_engine_in_half_precision_fits_a_limit(folder):
    file = _export(imgsz=640, half=True, mem_limit="66MiB")
    plan, *attempts = _journal(file)
    assert plan["splits"]
    assert plan["weights_bytes"] < 6 * MIB  # of 9 in FP32
    assert attempts[-1]["outcome"] == "built"


def test_less_effort_is_tried_while_memory_does_not_suffice(folder, library, static_file):
    job = engine.Job(static_file, folder / "n.engine", (1, 3, 640, 640))
    attempts = list(engine.build(library, job, 2 * MIB))
    assert [attempt.outcome for attempt in attempts] == ["out of memory"] * 4
    assert [attempt.level for attempt in attempts] == [None, 2, 1, 0]
    assert "OutOfMemory" in attempts[0].message
    assert not list(folder.iterdir())


def test_what_does_not_fit_says_what_it_needs_and_leaves_the_engine_there_was(folder):
    Path("yolov12n.engine").write_bytes(b"before")
    with pytest.raises(
        DoesNotFitError, match=r"needs \d+ MiB for weights.* there are 40 MiB.*limit of 40 MiB is mem_limit"
    ):
        _export(imgsz=320, mem_limit="40MiB")
    assert Path("yolov12n.engine").read_bytes() == b"before"


def test_a_builder_that_runs_out_of_memory_is_given_a_graph_that_is_split_further(folder, monkeypatch):
    """The reserve is made so small that the plan is too hopeful, which can happen on a card."""
    monkeypatch.setattr(budget, "RESERVE_BYTES", 0)
    with pytest.raises(DoesNotFitError, match=r"ran out of memory building .*it may use 32 MiB \(mem_limit\)"):
        _export(imgsz=640, mem_limit="32MiB")
    rows = _journal(Path("yolov12n.engine"))
    plans = [row["tensors_bytes"] for row in rows if "tensors_bytes" in row]
    assert len(plans) >= 2
    assert plans == sorted(plans, reverse=True)
    assert (
        sum(row.get("outcome") == "out of memory" for row in rows) == 4 + 1 + len(plans) - 1
    )  # efforts, whole, split further


def test_a_graph_that_the_library_refuses_is_another_error(folder, library, make):
    import onnx_ir as ir

    model = make([("Einsum", ["images"], "a", {"equation": "abcd->"})], outputs=["a"], ndim=0)
    ir.save(model, folder / "odd.onnx")
    proto = onnx.load(folder / "odd.onnx")
    proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, folder / "odd.onnx")
    job = engine.Job(folder / "odd.onnx", folder / "odd.engine", (1, 4, 8, 8))
    with pytest.raises(ExportError, match="cannot build"):
        list(engine.build(library, job, None))
    assert not job.engine.exists()


def test_a_build_that_is_killed_leaves_the_engine_there_was(folder, static_file):
    Path("n.engine").write_bytes(b"before")
    script = f"""
from pathlib import Path
from yolov12 import autopatch
autopatch.apply()
from yolov12.export import engine
from ultralytics.utils.export import engine as upstream
whole = upstream.json.dumps
def dumps(*args):  # Ultralytics writes metadata and then the engine
    print("writing", flush=True)
    import time
    time.sleep(3600)
upstream.json.dumps = dumps
job = engine.Job(Path({str(static_file)!r}), Path("n.engine"), (1, 3, 640, 640))
list(engine.build(engine.find("tensorrt_rtx"), job, None))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert any("writing" in line for line in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert Path("n.engine").read_bytes() == b"before"


def test_tensorrt_is_used_where_it_is_installed(folder, library, static_file, monkeypatch, tmp_path):
    """TensorRT itself cannot be installed here: RTX's module stands in for it, with timings to keep."""
    config_type = type(library.module.Builder(engine.logger(library.module)).create_builder_config())
    kept = []

    class Cache:
        def serialize(self):
            return b"timings"

    stand_in = ModuleType("tensorrt")
    vars(stand_in).update(vars(library.module), __version__="11.0.0", __spec__=None)
    monkeypatch.setattr(engine, "_import", lambda key: stand_in if key == "tensorrt" else library.module)
    monkeypatch.setattr(engine, "USER_CONFIG_DIR", tmp_path / "config")
    monkeypatch.setattr(config_type, "create_timing_cache", lambda self, data: kept.append(data), raising=False)
    monkeypatch.setattr(config_type, "set_timing_cache", lambda self, cache, ignore: True, raising=False)
    monkeypatch.setattr(config_type, "get_timing_cache", lambda self: Cache(), raising=False)
    found = engine.find("auto")
    assert found.name == "TensorRT 11.0.0"
    assert not found.is_rtx
    configure = engine.Library._configure

    def for_a_card(self, config, effort):
        configure(self, config, effort)
        config.num_compute_capabilities = 1
        config.set_compute_capability(self.module.ComputeCapability.SM86, 0)

    monkeypatch.setattr(engine.Library, "_configure", for_a_card)
    job = engine.Job(static_file, folder / "n.engine", (1, 3, 640, 640))
    for _ in range(2):
        assert [attempt.outcome for attempt in engine.build(found, job, None)] == ["built"]
    assert kept == [b"", b"timings"]


def test_an_engine_is_loaded_with_the_library_that_built_it(folder):
    file = _export(imgsz=160)
    done = subprocess.run(
        [sys.executable, "-c", f"from ultralytics import YOLO; YOLO({str(file)!r}, task='detect').predict()"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "No module named 'tensorrt'" not in done.stderr
    assert "NVIDIA" in done.stderr  # a GPU of whom is what is missing here


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"int8": True}, "INT8"),
        ({"device": "dla:0"}, "no DLA"),
        ({"engine_builder": "tensorflow"}, "engine_builder=tensorflow: give one of auto, tensorrt, tensorrt_rtx"),
        ({"engine_builder": "tensorrt"}, "needs TensorRT, which is in the Docker image"),
        ({"mem_limit": 0.5, "device": "cpu"}, "give bytes"),
        ({"format": "onnx", "mem_limit": 0.5}, "needs bytes"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_exported(folder, arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        _export(imgsz=160, **arguments)
    assert not list(folder.iterdir())


def test_without_the_engine_an_export_is_ultralytics_own(folder):
    with pytest.raises(Exception, match=r"(?i)cuda|TensorRT|GPU"):
        _export(imgsz=160, mas=False)
    first = Path(YOLO("yolov12n.yaml").export(format="onnx", imgsz=160, mem_limit="1MiB", mas=False, verbose=False))
    assert len(graph.load(first).graph) > 100


def test_onnx_is_split_to_a_limit(folder, run, real_image, planned):
    model = YOLO("yolov12n.yaml")
    whole = graph.load(Path(model.export(format="onnx", imgsz=640, verbose=False)).rename("whole.onnx"))
    split = graph.load(model.export(format="onnx", imgsz=640, verbose=False, mem_limit="75MiB"))
    shape = (1, 3, 640, 640)
    assert planned(split, shape).peak_bytes < planned(whole, shape).peak_bytes
    image = real_image(640, 640)
    assert abs(run(split, image)[0] - run(whole, image)[0]).max() < 1e-3
