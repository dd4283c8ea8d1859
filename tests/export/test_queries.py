"""Attention is split into parts of the queries, however a graph spells it."""

import numpy as np
import pytest

from yolov12.export import graph, queries
from yolov12.export.shapes import Sizes

SHAPE = (2, 3, 12, 8)  # images, heads, tokens, channels


def _attention(scale="Mul", transposed=False):
    """softmax(q kᵀ s) v, or v softmax(...)ᵀ, with q = k = v."""
    nodes = [
        ("Transpose", ["images"], "keys", {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["images", "keys"], "scores", {}),
        (scale, ["scores", "scale"], "scaled", {}),
        ("Softmax", ["scaled"], "weights", {"axis": -1}),
    ]
    if transposed:
        nodes.append(("Transpose", ["weights"], "turned", {"perm": [0, 1, 3, 2]}))
        nodes.append(("MatMul", ["keys", "turned"], "out", {}))
    else:
        nodes.append(("MatMul", ["weights", "images"], "out", {}))
    return nodes


def _found(model, shape):
    sizes = Sizes(model, graph.input_shapes(model, shape), graph.input_shapes(model, shape))
    return queries.find(model, sizes), sizes


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", ["Mul", "Div"])
@pytest.mark.parametrize("parts", [2, 5, 12])
def test_parts_are_the_whole_and_hold_less(make, run, planned, scale, transposed, parts):
    model = make(_attention(scale, transposed), SHAPE, {"scale": np.float32(0.5)})
    (site,), sizes = _found(model, SHAPE)
    assert site.most(sizes) == 12
    split = model.clone()
    site.apply(split, sizes, parts)
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    np.testing.assert_allclose(run(split, image)[0], run(model, image)[0], rtol=1e-5)
    assert sum(node.op_type == "Softmax" for node in split.graph) == parts
    scores = 2 * 3 * 12 * 12 * 4
    assert planned(model, SHAPE).peak_bytes >= 2 * scores
    assert (
        max(size for node, size in planned(split, SHAPE).bytes_per_node if node.op_type == "Softmax")
        < planned(model, SHAPE).peak_bytes
    )


def test_any_number_of_tokens_even_fewer_than_parts(make, run):
    model = make(_attention(), ("images", 3, "tokens", 8), {"scale": np.float32(0.5)})
    sizes = Sizes(model, {"images": (1, 3, 1, 8)}, {"images": SHAPE})
    (site,) = queries.find(model, sizes)
    split = model.clone()
    site.apply(split, sizes, 4)
    for tokens in (1, 3, 12, 13):
        image = np.random.default_rng(0).normal(size=(2, 3, tokens, 8)).astype(np.float32)
        np.testing.assert_allclose(run(split, image)[0], run(model, image)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (("Softmax", ["scaled"], "weights", {"axis": 2}), "over the queries"),
        (("Add", ["scores", "mask"], "scaled", {}), "a mask, whose rows would have to be split too"),
        (("MatMul", ["weights", "many"], "out", {}), "values of more axes"),
    ],
)
def test_other_things_are_left_alone(make, changed, why):
    nodes = [changed if node[2] == changed[2] else node for node in _attention()]
    model = make(
        nodes,
        SHAPE,
        {
            "scale": np.float32(0.5),
            "mask": np.zeros((12, 12), np.float32),
            "many": np.ones((2, 1, 1, 12, 8), np.float32),
        },
    )
    assert _found(model, SHAPE)[0] == [], why


def test_scores_that_somebody_else_reads_are_left_alone(make):
    model = make(_attention(), SHAPE, {"scale": np.float32(0.5)}, outputs=["out", "scores"])
    assert _found(model, SHAPE)[0] == []


def test_every_area_attention_is_found(static_file):
    model = graph.load(static_file)
    found, _ = _found(model, (1, 3, 640, 640))
    assert len(found) == 8  # two blocks of two in each of two layers, and not the Softmax of the box distribution
