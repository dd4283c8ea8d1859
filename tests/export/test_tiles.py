"""Strips compute what the whole computes, for convolutions of every kind, and only where they can."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov12.export import graph, tiles
from yolov12.export.regions import Growth
from yolov12.export.shapes import Sizes
from yolov12.export.windows import IMAGES, ROWS


def _sizes(model, least, most):
    return Sizes(model, graph.input_shapes(model, least), graph.input_shapes(model, most))


def _split(model, sizes, parts, nodes=None, axis=ROWS):
    names = nodes or [node.outputs[0].name for node in model.graph]
    copy = model.clone()
    return copy if tiles.Region(frozenset(names), axis).apply(copy, sizes, parts) is not None else None


def _weights(seed, shape):
    """Draw weights that keep tensors about as large as they are, so that rounding is as small after five layers."""
    spread = np.prod(shape[1:]) ** -0.5
    return np.random.default_rng(seed).normal(scale=spread, size=shape).astype(np.float32)


@st.composite
def chains(draw):
    """(nodes, constants) of a few convolutions, poolings, residuals and regroupings, one after the other."""
    nodes, constants, last = [], {}, "images"
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "conv", "pool", "silu", "residual", "regroup", "upsample"]))
        out = f"n{index}"
        if kind == "conv":
            kernel, stride, dilation = draw(
                st.sampled_from([(1, 1, 1), (3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 2), (1, 2, 1)])
            )
            pad = dilation * (kernel // 2)
            group = draw(st.sampled_from([1, 2, 4]))
            constants[f"w{index}"] = _weights(index, (4, 4 // group, kernel, kernel))
            constants[f"b{index}"] = np.ones(4, np.float32)  # rows outside the image are zeros, not the bias
            how = {"pads": [pad] * 4, "strides": [stride] * 2, "dilations": [dilation] * 2, "group": group}
            nodes.append(("Conv", [last, f"w{index}", f"b{index}"], out, how))
        elif kind == "pool":
            nodes.append(("MaxPool", [last], out, {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1] * 4}))
        elif kind == "silu":
            nodes += [("Sigmoid", [last], f"s{index}", {}), ("Mul", [last, f"s{index}"], out, {})]
        elif kind == "residual":
            constants[f"w{index}"] = _weights(index, (4, 4, 3, 3))
            nodes.append(("Conv", [last, f"w{index}"], f"c{index}", {"pads": [1] * 4}))
            nodes.append(("Add", [last, f"c{index}"], out, {}))
        elif kind == "upsample":
            constants[f"u{index}"] = np.array([1, 1, 2, 2], np.float32)
            how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            nodes.append(("Resize", [last, "", f"u{index}"], out, how))
        else:
            constants[f"w{index}"] = _weights(index, (4, 8, 1, 1))
            nodes.append(("Concat", [last, last], f"c{index}", {"axis": 1}))
            nodes.append(("Conv", [f"c{index}", f"w{index}"], out, {}))
        last = out
    return nodes, constants


@given(chain=chains(), parts=st.integers(2, 6), data=st.data())
def test_strips_are_the_whole(chain, parts, data, make, run):
    nodes, constants = chain
    shape = (1, 4, 32, 16)
    model = make(nodes, shape, constants)
    sizes = _sizes(model, shape, shape)
    names = [node.outputs[0].name for node in model.graph]
    first = data.draw(st.integers(0, len(names) - 1))
    split = _split(model, sizes, parts, names[first:])
    if split is None:
        assert min(sizes.most[name][2] for name in [*names[first:], "images"]) < parts
        return
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(run(split, image)[0], run(model, image)[0], rtol=1e-4, atol=1e-4)


def _grown(model, sizes, seeds, axis=ROWS, taken=frozenset(), limit=1 << 40):
    return Growth(model, sizes, axis, taken).around(frozenset(seeds), limit)


def _conv(make, shape, kernel=3, stride=1):
    return make(
        [
            ("Conv", ["images", "w"], "a", {"pads": [kernel // 2] * 4, "strides": [stride] * 2}),
            ("Relu", ["a"], "b", {}),
            ("Conv", ["b", "w"], "c", {"pads": [kernel // 2] * 4}),
        ],
        shape,
        {"w": np.random.default_rng(0).normal(size=(4, 4, kernel, kernel)).astype(np.float32)},
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_strips_of_any_size_of_image(make, run, stride):
    model = _conv(make, ("images", 4, "height", "width"), stride=stride)
    split = _split(model, _sizes(model, (1, 4, 32, 32), (2, 4, 256, 256)), 4)
    for shape in ((1, 4, 32, 32), (2, 4, 96, 64), (1, 4, 256, 32), (1, 4, 130, 32)):
        image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        np.testing.assert_allclose(run(split, image)[0], run(model, image)[0], rtol=1e-5, atol=1e-5)


def test_strips_that_would_be_padded_differently_at_another_size_are_refused(make):
    model = _conv(make, ("images", 4, "height", "width"), kernel=7)
    assert _split(model, _sizes(model, (1, 4, 8, 8), (1, 4, 256, 256)), 4) is None
    assert _split(model, _sizes(model, (1, 4, 256, 256), (1, 4, 256, 256)), 4) is not None


def test_no_strip_is_empty(make):
    model = _conv(make, (1, 4, 4, 4))
    sizes = _sizes(model, (1, 4, 4, 4), (1, 4, 4, 4))
    assert _split(model, sizes, 4) is not None
    assert _split(model, sizes, 5) is None


def test_images_one_after_the_other(make, run):
    shape = (3, 4, 16, 16)
    model = _conv(make, shape)
    split = _split(model, _sizes(model, shape, shape), 3, axis=IMAGES)
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(run(split, image)[0], run(model, image)[0], rtol=1e-5, atol=1e-5)
    assert not any(node.op_type == "Conv" and "pads" not in node.attributes for node in split.graph)


def test_a_region_grows_to_where_little_is_held(make):
    """The tensors inside the region are wide, those at its two ends narrow."""
    narrow, wide = np.ones((1, 8, 1, 1), np.float32), np.ones((8, 1, 1, 1), np.float32)
    model = make(
        [
            ("Softmax", ["images"], "a", {"axis": 1}),
            ("Conv", ["a", "wide"], "b", {}),
            ("Relu", ["b"], "c", {}),
            ("Conv", ["c", "narrow"], "d", {}),
            ("Softmax", ["d"], "e", {"axis": 1}),
        ],
        (1, 1, 16, 16),
        {"wide": wide, "narrow": narrow},
    )
    sizes = _sizes(model, (1, 1, 16, 16), (1, 1, 16, 16))
    grown = _grown(model, sizes, ["c"])
    assert grown[0].nodes == {"c"}
    assert grown[-1].nodes == {"b", "c", "d"}
    assert _grown(model, sizes, ["c"], limit=2048) == [grown[-1]]  # at whose border are two tensors of 1 KiB
    assert _grown(model, sizes, ["c"], taken=frozenset(["d"]))[-1].nodes == {"b", "c"}
    assert _grown(model, sizes, ["a"]) == []  # Softmax over channels: not known to be local


def test_what_lies_between_comes_along(make):
    model = make(
        [("Relu", ["images"], "a", {}), ("Sigmoid", ["a"], "b", {}), ("Mul", ["a", "b"], "c", {})], (1, 4, 16, 16)
    )
    sizes = _sizes(model, (1, 4, 16, 16), (1, 4, 16, 16))
    assert _grown(model, sizes, ["a", "c"])[0].nodes == {"a", "b", "c"}
    assert _grown(model, sizes, ["a", "c"], taken=frozenset(["b"])) == []


@pytest.mark.parametrize(
    ("node", "axis", "why"),
    [
        (("Concat", ["images", "same"], "a", {"axis": 1}), ROWS, "a constant that would have to be split too"),
        (("Resize", ["images", "", "", "lengths"], "a", {"mode": "nearest"}), IMAGES, "resized to lengths"),
        (("Conv", ["images", "computed"], "a", {}), IMAGES, "weights that are computed"),
        (("Softmax", ["images"], "a", {"axis": 2}), ROWS, "over rows"),
    ],
)
def test_what_is_not_of_one_strip_is_left_whole(make, node, axis, why):
    shape = (2, 4, 16, 16)
    constants = {
        "same": np.ones((2, 4, 16, 16), np.float32),
        "lengths": np.array([2, 4, 32, 32], np.int64),
        "raw": np.ones((2048, 4, 1, 1), np.float32),
    }
    computed = [("Relu", ["raw"], "computed", {})] if "computed" in node[1] else []
    model = make([*computed, node], shape, constants)
    sizes = _sizes(model, shape, shape)
    assert _grown(model, sizes, ["a"], axis) == [], why
