"""Instrumented run of an ONNX graph, independent of the plan of its memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def peak(file: Path, image: np.ndarray) -> int:
    """Run a graph's nodes one by one, in the order of the file, and drop arrays when no later node reads them.

    Args:
        file: ONNX graph with an input `images`.
        image: Input, (images, 3, height, width).

    Returns:
        Peak of the bytes of all arrays at one time, without weights and the input. A view and its source count once.
    """
    proto = onnx.load(file)
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    weights, held, most = set(arrays) | {"images"}, dict[str, int](), 0
    arrays["images"] = image
    readers = Counter(name for node in proto.graph.node for name in node.input)
    readers.update(each.name for each in proto.graph.output)
    owner: dict[str, str] = {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for node in proto.graph.node:
        graph = helper.make_graph(
            [node],
            "node",
            [_typed(name, arrays[name]) for name in dict.fromkeys(node.input) if name],
            [helper.make_empty_tensor_value_info(name) for name in node.output],
        )
        single = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=9)
        session = onnxruntime.InferenceSession(single.SerializeToString(), options, ["CPUExecutionProvider"])
        inputs = {name: arrays[name] for name in node.input if name}
        for name, array in zip(node.output, session.run(None, inputs), strict=True):
            arrays[name] = array
            looks_at = node.op_type in VIEWS
            owner[name] = owner.get(node.input[0], node.input[0]) if looks_at else name
            held[owner[name]] = held.get(owner[name], 0) if looks_at else array.nbytes
        most = max(most, sum(held.values()))
        readers.subtract(name for name in node.input)
        for name in [name for name in arrays if name not in weights and readers[name] == 0]:
            del arrays[name]
        needed = {owner.get(name) for name in arrays}
        held = {name: size for name, size in held.items() if name in needed}
    return most


def _typed(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
