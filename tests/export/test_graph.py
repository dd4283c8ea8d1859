"""The memory plan of a graph: which tensors are live when. onnxruntime agrees."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from yolov12.errors import ConfigError
from yolov12.export import graph
from yolov12.export.shapes import Shapes

ROW = 4 * 8 * 8 * 4  # bytes of a (1, 4, 8, 8) tensor


def test_a_tensor_lives_until_its_last_reader(make, planned):
    model = make(
        [
            ("Softmax", ["images"], "a", {"axis": 1}),
            ("Softmax", ["a"], "b", {"axis": 1}),
            ("Softmax", ["b"], "c", {"axis": 1}),
            ("Concat", ["a", "c"], "d", {"axis": 1}),
        ]
    )
    found = planned(model, (1, 4, 8, 8))
    assert [size // ROW for _, size in found.bytes_per_node] == [1, 2, 3, 4]  # b dies with c, so d lives beside a and c
    assert found.peak_bytes == 4 * ROW
    assert found.node.name == "d"
    assert found.inputs_bytes == ROW
    assert [value.name for value, _ in found.live] == ["d", "a", "c"]


def test_views_take_no_bytes_and_keep_what_they_look_at(make, planned):
    model = make(
        [
            ("Softmax", ["images"], "a", {"axis": 1}),
            ("Reshape", ["a", "flat"], "b", {}),
            ("Softmax", ["images"], "c", {"axis": 1}),
            ("Softmax", ["b"], "d", {"axis": 1}),
        ],
        constants={"flat": np.array([1, 256], np.int64)},
        outputs=["c", "d"],
        ndim=None,
    )
    assert [size // ROW for _, size in planned(model, (1, 4, 8, 8)).bytes_per_node] == [1, 1, 2, 3]


def test_outputs_live_to_the_end_and_weights_are_counted_apart(make, planned):
    model = make(
        [("Conv", ["images", "w"], "a", {}), ("Softmax", ["images"], "b", {"axis": 1})],
        constants={"w": np.ones((4, 4, 1, 1), np.float32)},
        outputs=["a", "b"],
    )
    found = planned(model, (1, 4, 8, 8))
    assert found.peak_bytes == 2 * ROW
    assert found.weights_bytes == 64


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 96), (2, 3, 160, 128)])
def test_shapes_of_dynamic_graphs_are_those_that_onnxruntime_finds(dynamic_file, shape):
    model = graph.load(dynamic_file)
    shapes = Shapes(model, graph.input_shapes(model, shape))
    proto = onnx.load(dynamic_file)
    names = [name for node in proto.graph.node for name in node.output]
    for name in set(names) - {value.name for value in proto.graph.output}:
        proto.graph.output.add().name = name
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    outputs = [each.name for each in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {"images": np.zeros(shape, np.float32)}), strict=True))
    assert {value.name: shape for value, shape in shapes.items() if value.name in found} == {
        name: np.shape(array) for name, array in found.items()
    }
    values = {value.name: value for value in shapes}
    for name, array in found.items():
        assert shapes.bytes_of(values[name]) == array.nbytes
        if values[name] in shapes.contents:
            np.testing.assert_array_equal(shapes.contents[values[name]], array)


@pytest.mark.parametrize(("which", "size"), [("static_file", 640), ("dynamic_file", 320)])
def test_peak_is_that_of_a_run_node_by_node(which, size, request, measured, planned, real_image):
    file = request.getfixturevalue(which)
    peak = measured(file, real_image(size, size))
    assert planned(graph.load(file), (1, 3, size, size)).peak_bytes == pytest.approx(peak, rel=1e-3)


def test_a_graph_whose_sizes_depend_on_the_image_is_refused(make):
    model = make([("NonZero", ["images"], "a", {})])
    with pytest.raises(ConfigError, match="depends on the image"):
        Shapes(model, {})


def test_an_operator_that_nobody_knows_is_refused(make):
    model = make([("Relu", ["images"], "a", {})])
    model.graph.node(0).op_type = "NoSuchOperator"
    with pytest.raises(ConfigError, match="NoSuchOperator"):
        Shapes(model, {})


def test_an_input_of_any_length_needs_a_largest_one(dynamic_file):
    with pytest.raises(ConfigError, match="say how long"):
        Shapes(graph.load(dynamic_file), {})


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"no\.onnx cannot be read"):
        graph.load(tmp_path / "no.onnx")


def test_shapes_of_a_changed_copy_are_taken_over(static_file):
    model = graph.load(static_file)
    shapes = Shapes(model, {})
    copy = Shapes(model.clone(), {}, shapes.known())
    assert {value.name: shape for value, shape in copy.items()} == {value.name: s for value, s in shapes.items()}
    contents = {value.name: array.tolist() for value, array in shapes.contents.items()}
    assert {value.name: array.tolist() for value, array in copy.contents.items()} == contents != {}


def test_an_input_that_is_no_image_is_refused(make):
    with pytest.raises(ConfigError, match="has 2 axes"):
        graph.input_shapes(make([("Relu", ["images"], "a", {})], (3, 4)), (1, 3, 640, 640))


def test_operators_are_those_of_the_graphs_opset():
    """Until opset 12 Unsqueeze had its axes as an attribute."""
    nodes = [
        onnx.helper.make_node("Shape", ["images"], ["shape"]),
        onnx.helper.make_node("Gather", ["shape", "index"], ["length"], axis=0),
        onnx.helper.make_node("Unsqueeze", ["length"], ["lengths"], axes=[0]),
        onnx.helper.make_node("Expand", ["one", "lengths"], ["out"]),
    ]
    made = onnx.helper.make_graph(
        nodes,
        "old",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3])],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [None])],
        [
            onnx.numpy_helper.from_array(np.array(0, np.int64), "index"),
            onnx.numpy_helper.from_array(np.array([1.0], np.float32), "one"),
        ],
    )
    model = ir.from_proto(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=8))
    shapes = Shapes(model, {"images": (5, 3)})
    assert {value.name: shape for value, shape in shapes.items()}["out"] == (5,)


def test_a_graph_in_half_precision_is_planned_at_half_the_bytes(static_file, planned, run, real_image):
    """Its casts come in an order that can be planned, unlike onnxruntime's own."""
    model = graph.load(static_file)
    before = ir.to_proto(model).SerializeToString()
    half = graph.to_half(model)
    assert ir.to_proto(model).SerializeToString() == before
    shape = (1, 3, 640, 640)
    assert planned(half, shape).peak_bytes == pytest.approx(planned(model, shape).peak_bytes / 2, rel=0.01)
    image = real_image(640, 640)
    np.testing.assert_allclose(run(half, image)[0][:, :4], run(model, image)[0][:, :4], atol=2)  # pixels
