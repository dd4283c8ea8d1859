"""Graphs to plan, split and build: real ones, exported once, and small ones that a test writes down."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from yolov12 import YOLO
from yolov12.export import graph
from yolov12.export.shapes import Shapes

Shape = tuple[int | str, ...]


def _exported(folder: Path, name: str, **arguments) -> Path:
    before = Path.cwd()
    os.chdir(folder)
    try:
        file = YOLO(name).export(format="onnx", verbose=False, **arguments)
    finally:
        os.chdir(before)
    return folder / file


@pytest.fixture(scope="session")
def static_file(tmp_path_factory) -> Path:
    """YOLOv12-N at 640."""
    return _exported(tmp_path_factory.mktemp("static"), "yolov12n.yaml", imgsz=640)


@pytest.fixture(scope="session")
def dynamic_file(tmp_path_factory) -> Path:
    """YOLOv12-N for any number of images of any size."""
    return _exported(tmp_path_factory.mktemp("dynamic"), "yolov12n.yaml", imgsz=640, dynamic=True)


@pytest.fixture(scope="session")
def real_image() -> Callable[[int, int], np.ndarray]:
    """Return a photograph as the model gets it: (1, 3, height, width), 0 to 1."""
    import cv2
    from ultralytics.utils import ASSETS

    def image(height: int, width: int) -> np.ndarray:
        picture = cv2.resize(cv2.imread(str(ASSETS / "bus.jpg")), (width, height))
        return np.ascontiguousarray(picture[None, ..., ::-1].transpose(0, 3, 1, 2), np.float32) / 255

    return image


@pytest.fixture(scope="session")
def make() -> Callable[..., ir.Model]:
    """Build a graph: `make([(op, inputs, output, attributes), ...], input=shape, constants={name: array})`."""

    def model(nodes, shape: Shape = (1, 4, 8, 8), constants=None, outputs=None, ndim=None) -> ir.Model:
        made = [helper.make_node(op, inputs, [out], name=out, **attributes) for op, inputs, out, attributes in nodes]
        outputs = outputs or [nodes[-1][2]]
        proto = helper.make_model(
            helper.make_graph(
                made,
                "graph",
                [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
                [
                    helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * (ndim or len(shape)))
                    for name in outputs
                ],
                [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=9,
        )
        onnx.checker.check_model(proto)
        return ir.from_proto(proto)

    return model


@pytest.fixture(scope="session")
def run() -> Callable[..., list[np.ndarray]]:
    """Run a graph in onnxruntime on an image."""

    def outputs(model: ir.Model | Path, image: np.ndarray) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"images": image})

    return outputs


@pytest.fixture(scope="session")
def measured() -> Callable[[Path, np.ndarray], int]:
    """Run a graph's nodes one by one, and return the most bytes that live arrays took at one time."""
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "node_by_node.py"))["peak"]


@pytest.fixture
def planned() -> Callable[..., graph.MemoryPlan]:
    """Plan a graph at the largest size given."""

    def plan(model: ir.Model, shape: tuple[int, ...]) -> graph.MemoryPlan:
        return graph.plan(model, Shapes(model, graph.input_shapes(model, shape)))

    return plan
