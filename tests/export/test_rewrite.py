"""Graphs that fit are left alone; others are split until they do, and find the same in a photograph."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from yolov12 import YOLO
from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.export import graph
from yolov12.export.rewrite import _Search, split
from yolov12.export.shapes import Shapes

MIB = 2**20


def test_a_graph_that_fits_is_left_alone(static_file):
    model = graph.load(static_file)
    most = graph.input_shapes(model, (1, 3, 640, 640))
    done = split(model, graph.plan(model, Shapes(model, most)).peak_bytes, most)
    assert done.model is model
    assert done.sites == {}


@pytest.mark.parametrize("limit", [0.75, 0.5])
def test_a_split_graph_fits_and_finds_the_same(static_file, limit, run, real_image, planned):
    model = graph.load(static_file)
    before = ir.to_proto(model).SerializeToString()
    shape = (1, 3, 640, 640)
    whole = planned(model, shape)
    done = split(model, int(limit * whole.peak_bytes), graph.input_shapes(model, shape))
    assert planned(done.model, shape).peak_bytes == done.plan.peak_bytes <= limit * whole.peak_bytes
    assert ir.to_proto(model).SerializeToString() == before
    assert len(done.describe()) == len(done.sites) > 0
    proto = ir.to_proto(done.model)
    onnx.checker.check_model(proto, full_check=True)
    assert {each.key for each in proto.metadata_props} >= {"stride", "names", "imgsz"}
    assert [each.name for each in proto.graph.output] == ["output0"]
    image = real_image(640, 640)
    np.testing.assert_allclose(run(done.model, image)[0], run(model, image)[0], atol=1e-3)


def test_a_dynamic_graph_fits_at_its_largest_and_works_at_every_size(dynamic_file, run, real_image, planned):
    model = graph.load(dynamic_file)
    largest = (2, 3, 1280, 1280)
    least, most = (graph.input_shapes(model, shape) for shape in ((1, 3, 32, 32), largest))
    done = split(model, planned(model, largest).peak_bytes // 3, most, least)
    assert planned(done.model, largest).peak_bytes <= planned(model, largest).peak_bytes // 3
    assert {type(site).__name__ for site in done.sites} == {"Attention", "Region"}
    for height, width in ((32, 32), (96, 160), (640, 480)):
        image = np.repeat(real_image(height, width), 2, 0)
        np.testing.assert_allclose(run(done.model, image)[0], run(model, image)[0], atol=1e-3)


def test_several_images_are_taken_one_by_one_where_that_helps(make):
    model = make(
        [("Conv", ["images", "w"], "a", {}), ("Relu", ["a"], "b", {}), ("Conv", ["b", "v"], "c", {})],
        (4, 4, 8, 8),
        {"w": np.ones((64, 4, 1, 1), np.float32), "v": np.ones((1, 64, 1, 1), np.float32)},
    )
    done = split(model, 40_000, {})
    assert done.plan.peak_bytes <= 40_000
    assert "by images" in done.describe()[0]


@pytest.mark.slow
def test_what_cannot_be_split_is_an_error_that_says_how_small_it_gets(static_file):
    model = graph.load(static_file)
    with pytest.raises(
        DoesNotFitError, match=r"needs about [4-9] MiB for its tensors.*leaves 3 MiB.*Use a smaller imgsz="
    ):
        split(model, 3 * MIB, graph.input_shapes(model, (1, 3, 640, 640)))


def test_a_graph_that_fits_need_not_work_at_the_smallest_size(make):
    """A graph that picks 300 boxes does not: an image of 32 pixels has fewer."""
    nodes = [("Reshape", ["images", "flat"], "a", {}), ("TopK", ["a", "k"], "b", {})]
    model = make([nodes[0]], ("n", 4, 8, 8), {"flat": np.array([-1], np.int64), "k": np.array([300], np.int64)}, ndim=1)
    topk = ir.node("TopK", [model.graph.outputs[0], model.graph.initializers["k"]], num_outputs=2)
    for index, value in enumerate(topk.outputs):
        value.name = f"top{index}"
    model.graph.append(topk)
    model.graph.outputs[:] = topk.outputs
    most = {"images": (4, 4, 8, 8)}
    assert split(model, MIB, most, {"images": (1, 4, 8, 8)}).sites == {}


def test_graphs_of_old_opsets_are_not_split(make):
    model = make([("Relu", ["images"], "a", {})])
    model.opset_imports[""] = 12
    with pytest.raises(ConfigError, match="opset=13 or newer"):
        split(model, 10, {})


def test_a_model_with_two_outputs_and_another_attention(tmp_path, monkeypatch, run, real_image):
    """YOLO11's attention multiplies by its transposed weights; masks are a second output."""
    monkeypatch.chdir(tmp_path)
    model = graph.load(YOLO("yolo11n-seg.yaml").export(format="onnx", imgsz=320, verbose=False))
    most = graph.input_shapes(model, (1, 3, 320, 320))
    done = split(model, int(0.8 * graph.plan(model, Shapes(model, most)).peak_bytes), most)
    assert done.sites
    image = real_image(320, 320)
    for found, whole in zip(run(done.model, image), run(model, image), strict=True):
        np.testing.assert_allclose(found, whole, atol=1e-3)


def test_a_split_that_raises_the_peak_elsewhere_is_not_taken():
    """The first split brings its own place under the goal, and keeps more alive at another."""

    def trial(own_bytes, peak_bytes):
        plan = SimpleNamespace(peak_bytes=peak_bytes)
        return SimpleNamespace(split=SimpleNamespace(plan=plan), peak_bytes_at=lambda site: own_bytes)

    trials = {"first": trial(60, 101), "second": trial(65, 100)}
    search = _Search.__new__(_Search)
    search._proposals = lambda now, goal: (({site: 2}, site) for site in trials)
    search._try = lambda sites: trials[next(iter(sites))]
    assert search._better(trial(100, 100), 70) is trials["second"]
    del trials["second"]
    assert search._better(trial(100, 100), 70) == 60
