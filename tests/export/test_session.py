"""One export: its graph is read and planned once, variants stay in memory, the file is written just before a build."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

from yolov12 import YOLO, files
from yolov12.errors import DoesNotFitError, ExportError
from yolov12.export import engine, graph, session
from yolov12.models.weight_names import DEMO, is_packaged

MIB = 2**20
LIMIT = "220MiB"  # less than the graph needs for images of 1280: 48 MiB are the builder's, 176 are tensors


class Counts:
    """What an export did with its graph."""

    def __init__(self) -> None:
        self.loads = 0
        self.plans: Counter[tuple[str, ...]] = Counter()
        """Names of a graph's nodes → number of times that it was planned."""
        self.writes = 0
        """Number of times that the ONNX file was written."""


@pytest.fixture
def counts(monkeypatch) -> Counts:
    found = Counts()
    load, plan, write = graph.load, graph.plan, files.write

    def counting_load(file):
        found.loads += 1
        return load(file)

    def counting_plan(model, shapes):
        found.plans[tuple(str(node.name) for node in model.graph)] += 1
        return plan(model, shapes)

    def counting_write(path, write_to):
        found.writes += Path(path).suffix == ".onnx"
        return write(path, write_to)

    monkeypatch.setattr(graph, "load", counting_load)
    monkeypatch.setattr(graph, "plan", counting_plan)
    monkeypatch.setattr(files, "write", counting_write)
    return found


@pytest.fixture
def builder(monkeypatch) -> Callable[..., list[bytes]]:
    """Put a builder in the libraries' place: `builder(fails=8)` returns the graphs it is given, as bytes."""

    def stand_in(fails: int, is_rtx: bool = True, outcome: str = "out of memory") -> list[bytes]:
        seen: list[bytes] = []

        def attempt(library, job, workspace, effort):
            seen.append(job.onnx.read_bytes())
            if len(seen) <= fails:
                return outcome, "told to fail"
            job.engine.write_bytes(b"engine")
            return "built", ""

        library = SimpleNamespace(name="Builder 1.0", is_rtx=is_rtx)
        monkeypatch.setattr(engine, "find", lambda key: library)
        monkeypatch.setattr(engine, "_attempt", attempt)
        return seen

    return stand_in


@pytest.fixture
def exporter(dynamic_file, tmp_path) -> Callable[..., SimpleNamespace]:
    """Stand in for Ultralytics' exporter, which exports a file that is there already."""

    def make(**arguments) -> SimpleNamespace:
        onnx_file = tmp_path / "n.onnx"
        shutil.copy(dynamic_file, onnx_file)
        settings = {
            "mas": True,
            "format": "engine",
            "engine_builder": "auto",
            "quantize": None,
            "dynamic": True,
            "workspace": None,
            "verbose": False,
            "mem_limit": LIMIT,
        }
        return SimpleNamespace(
            args=SimpleNamespace(**{**settings, **arguments}),
            export_onnx=lambda: str(onnx_file),
            model=torch.nn.Identity(),
            im=torch.zeros(1, 3, 640, 640),
            device=torch.device("cpu"),
            file=tmp_path / "n.pt",
            metadata={},
            dla=None,
            qat=False,
        )

    return make


def _parts(data: bytes) -> int:
    """Nodes that splitting a graph has added."""
    return sum("/part" in node.name or "/strip" in node.name for node in onnx.load_model_from_string(data).graph.node)


def test_a_graph_is_read_and_planned_once_however_many_builds_fail(exporter, builder, counts, dynamic_file, tmp_path):
    seen = builder(fails=99)
    with pytest.raises(DoesNotFitError, match=r"ran out of memory building .*it may use 220 MiB \(mem_limit\)"):
        session.export_engine(lambda self: None, exporter(), "")
    assert counts.loads == 1
    assert set(counts.plans.values()) == {1}
    whole = dynamic_file.read_bytes()
    split, tighter = seen[:4], seen[5:]
    assert len(set(split)) == 1  # four efforts at one graph
    assert seen[4] == whole
    assert len(tighter) == len(set(tighter)) == 2
    assert 0 < _parts(split[0]) < _parts(tighter[0]) < _parts(tighter[1])
    assert counts.writes == 5  # split, whole, tighter twice, and whole for who looks
    assert (tmp_path / "n.onnx").read_bytes() == whole
    rows = json.loads((tmp_path / "n.export.json").read_text())
    assert [row["outcome"] for row in rows if "outcome" in row] == ["out of memory"] * 7
    assert [len(row["splits"]) > 0 for row in rows if "splits" in row] == [True, False, True, True]


def test_the_graph_that_was_built_stays_in_the_file(exporter, builder, counts, tmp_path):
    seen = builder(fails=5)
    file = session.export_engine(lambda self: None, exporter(), "")
    assert file.read_bytes() == b"engine"
    assert len(seen) == 6
    assert (tmp_path / "n.onnx").read_bytes() == seen[-1]
    assert counts.loads == 1


def test_a_graph_that_fits_is_not_written(exporter, builder, counts, dynamic_file, tmp_path):
    seen = builder(fails=0)
    session.export_engine(lambda self: None, exporter(mem_limit="1GiB"), "")
    assert seen == [dynamic_file.read_bytes()]
    assert (counts.loads, counts.writes) == (1, 0)


def test_without_a_limit_the_file_is_not_even_read(exporter, builder, counts, dynamic_file):
    seen = builder(fails=0)
    session.export_engine(lambda self: None, exporter(mem_limit=None), "")
    assert seen == [dynamic_file.read_bytes()]
    assert (counts.loads, sum(counts.plans.values()), counts.writes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("limit", "planned", "is_split"), [(None, False, False), ("1GiB", True, False), ("140MiB", True, True)]
)
def test_a_graph_in_half_precision_is_converted_in_memory(exporter, builder, counts, limit, planned, is_split):
    seen = builder(fails=1)
    session.export_engine(lambda self: None, exporter(quantize=16, mem_limit=limit), "")
    types = {each.data_type for each in onnx.load_model_from_string(seen[0]).graph.initializer if len(each.dims) == 4}
    assert types == {onnx.TensorProto.FLOAT16}
    assert seen[1] == seen[0]
    assert (_parts(seen[0]) > 0) is is_split
    assert (counts.loads, counts.writes) == (1, 1)
    assert set(counts.plans.values()) == ({1} if planned else set())


def test_tensorrt_may_use_twice_the_plan_as_it_runs_in_half_precision(exporter, builder, tmp_path):
    builder(fails=0, is_rtx=False)
    session.export_engine(lambda self: None, exporter(quantize=16, mem_limit="140MiB"), "")
    plan, attempt = json.loads((tmp_path / "n.export.json").read_text())
    assert plan["limit_bytes"] == 280 * MIB
    assert plan["limit"] == "mem_limit, doubled because the plan counts FP32"
    assert attempt["workspace_bytes"] == 140 * MIB


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"workspace": 0.5}, (512 * MIB, "workspace")),
        ({"workspace": 0.5, "mem_limit": "384MiB"}, (384 * MIB, "mem_limit")),
        ({"workspace": 0.375, "mem_limit": "512MiB"}, (384 * MIB, "workspace")),
    ],
)
def test_of_workspace_and_limit_the_smaller_counts(exporter, builder, tmp_path, arguments, allowed):
    builder(fails=0)
    session.export_engine(lambda self: None, exporter(**{"mem_limit": None, **arguments}), "")
    plan, attempt = json.loads((tmp_path / "n.export.json").read_text())
    assert (plan["limit_bytes"], plan["limit"]) == allowed
    assert attempt["workspace_bytes"] == allowed[0]


def test_a_refusal_for_another_reason_ends_the_export(exporter, builder):
    seen = builder(fails=1, outcome="failed")
    with pytest.raises(ExportError, match=r"cannot build .*told to fail"):
        session.export_engine(lambda self: None, exporter(), "")
    assert len(seen) == 1


def test_a_graph_that_cannot_be_planned_is_built_as_it_is(exporter, builder, counts):
    made = exporter()
    file = Path(made.export_onnx())
    file.write_bytes(b"no graph")
    seen = builder(fails=99)
    with pytest.raises(DoesNotFitError):
        session.export_engine(lambda self: None, made, "")
    assert seen == [b"no graph"] * 4
    assert counts.writes == 0


@pytest.mark.parametrize(("limit", "loads", "writes"), [(None, 0, 0), ("1GiB", 1, 0), (LIMIT, 1, 1)])
def test_onnx_that_fits_is_not_touched(exporter, counts, dynamic_file, limit, loads, writes):
    made = exporter(format="onnx", mem_limit=limit)
    file = Path(session.export_onnx(lambda self: shutil.copy(dynamic_file, self.export_onnx()), made))
    assert (file.read_bytes() == dynamic_file.read_bytes()) is (writes == 0)
    assert (counts.loads, counts.writes) == (loads, writes)
    assert set(counts.plans.values()) <= {1}


@pytest.mark.parametrize("was_there", [True, False])
def test_onnx_that_cannot_be_split_so_small_leaves_what_was_there(exporter, dynamic_file, tmp_path, was_there):
    made, file = exporter(format="onnx", mem_limit="40MiB"), tmp_path / "n.onnx"

    def export(_):
        shutil.copy(dynamic_file, file)
        return str(file)

    file.write_bytes(b"of before") if was_there else file.unlink()
    with pytest.raises(DoesNotFitError, match="limit of 40 MiB is mem_limit"):
        session.export_onnx(export, made)
    assert [each.read_bytes() for each in tmp_path.glob("n.onnx*")] == [b"of before"] * was_there
    with pytest.raises(OSError, match="disk"):
        session.export_onnx(lambda _: _full(file), made)
    assert [each.read_bytes() for each in tmp_path.glob("n.onnx*")] == [b"of before"] * was_there
    made.args.mem_limit = "1GiB"
    session.export_onnx(export, made)
    assert [each.read_bytes() for each in tmp_path.glob("n.onnx*")] == [dynamic_file.read_bytes()]


def _full(file):
    file.write_bytes(b"half")
    raise OSError("the disk is full")


def test_what_is_exported_from_the_weights_of_this_package_goes_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = YOLO(DEMO)
    assert model.export(format="torchscript", imgsz=64) == "yolov12n-demo.torchscript"
    assert [each.name for each in tmp_path.iterdir()] == ["yolov12n-demo.torchscript"]
    assert not is_packaged(tmp_path / DEMO)
    assert is_packaged(model.model.pt_path)
