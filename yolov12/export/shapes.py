"""Shapes of all tensors in an ONNX graph for given inputs, without running the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from yolov12.errors import ConfigError

__all__ = ["Known", "Shapes", "Sizes"]

_SMALL = 4096  # elements: tensors that are computed from shapes have a few, anchors and weights have more


class Known(NamedTuple):
    """Facts about a tensor that are known without running the graph."""

    shape: tuple[int, ...]
    dtype: ir.DataType
    array: np.ndarray[Any, Any] | None
    """Its contents if they follow from shapes alone, else None."""


class Shapes(dict[ir.Value, tuple[int, ...]]):
    """The shape of every tensor in a graph, for inputs of given shapes.

    `contents` has the values of tensors that follow from shapes alone, `dtypes` the type of every tensor.

    Args:
        model: Any graph of standard operators, dynamic axes allowed.
        inputs: Input name → shape. Inputs with fixed shapes may be left out.
        known: Tensor name → facts that are known already, such as those of the graph that this one was made from.
            These tensors are not inferred again.

    Raises:
        ConfigError: An input has an axis of unknown length, or the shape of a node's output depends on the image.
    """

    def __init__(
        self, model: ir.Model, inputs: Mapping[str, Sequence[int]], known: Mapping[str, Known] | None = None
    ) -> None:
        super().__init__()
        self.contents: dict[ir.Value, np.ndarray[Any, Any]] = {}
        self.dtypes: dict[ir.Value, ir.DataType] = {}
        self._known = known or {}
        self._opsets = [onnx.helper.make_opsetid(name, version) for name, version in model.opset_imports.items()]
        for value in model.graph.inputs:
            self._set(value, tuple(inputs.get(value.name or "") or _fixed_shape(value)), value.dtype)
        for value in model.graph.initializers.values():
            self._set_constant(value, value.const_value)
        for node in model.graph:
            self._infer(node)

    def known(self, values: Iterable[ir.Value] | None = None) -> dict[str, Known]:
        """Return what is known of some tensors, or of all of them, by name."""
        return {
            str(value.name): Known(self[value], self.dtypes[value], self.contents.get(value))
            for value in (self if values is None else values)
        }

    def bytes_of(self, value: ir.Value) -> int:
        """Return the bytes of a tensor."""
        return int(np.prod(self[value], dtype=np.int64) * self.dtypes[value].bitwidth) // 8

    def _infer(self, node: ir.Node) -> None:
        if all(value.name in self._known for value in node.outputs):
            for value in node.outputs:
                self._set_known(value, self._known[str(value.name)])
            return
        if node.op_type == "Constant":
            output = node.outputs[0]
            self._set_constant(output, output.const_value or ir.convenience.get_const_tensor(output))
            return
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Shape":
            bounds = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
            self._set_array(node.outputs[0], np.asarray(self[inputs[0]][slice(*bounds)], np.int64))
        elif not (all(value in self.contents for value in inputs) and self._evaluate(node, inputs)):
            self._infer_types(node, inputs)

    def _set(self, value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType | None) -> None:
        self[value], self.dtypes[value] = shape, dtype or ir.DataType.FLOAT

    def _set_known(self, value: ir.Value, known: Known) -> None:
        self._set(value, known.shape, known.dtype)
        if known.array is not None:
            self.contents[value] = known.array

    def _set_constant(self, value: ir.Value, tensor: Any) -> None:
        self._set(value, tuple(tensor.shape.numpy()), tensor.dtype)
        if tensor.size <= _SMALL:
            self.contents[value] = tensor.numpy()

    def _set_array(self, value: ir.Value, array: np.ndarray[Any, Any]) -> None:
        self._set(value, array.shape, ir.DataType.from_numpy(array.dtype))
        if array.size <= _SMALL:
            self.contents[value] = array

    def _evaluate(self, node: ir.Node, inputs: Sequence[ir.Value]) -> bool:
        """Compute a node whose inputs have known contents; return False if that fails."""
        named = {str(value.name): self.contents[value] for value in inputs}
        types = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in named.items()
        ]
        outputs = [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in node.outputs]
        alone = onnx.helper.make_graph([ir.to_proto(node)], "node", types, outputs)
        try:
            arrays = ReferenceEvaluator(onnx.helper.make_model(alone, opset_imports=self._opsets)).run(None, named)
        except Exception:  # whatever the operator raises: its shape can still be inferred from types
            return False
        for value, array in zip(node.outputs, arrays, strict=True):
            self._set_array(value, np.asarray(array))
        return True

    def _infer_types(self, node: ir.Node, inputs: Sequence[ir.Value]) -> None:
        """Infer the outputs of a node from the types of its inputs, by ONNX's own rules."""
        types = {
            str(value.name): onnx.helper.make_tensor_type_proto(self.dtypes[value].value, self[value])
            for value in inputs
        }
        data = {
            str(value.name): onnx.numpy_helper.from_array(self.contents[value])
            for value in inputs
            if value in self.contents
        }
        try:
            version = next(each.version for each in self._opsets if each.domain == node.domain)
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema, ir.to_proto(node), types, data, opset_imports=self._opsets
            )
        except (StopIteration, onnx.defs.SchemaError, onnx.shape_inference.InferenceError) as error:
            raise ConfigError(f"node {node.name} ({node.op_type}) is not one that can be planned: {error}") from error
        for value in node.outputs:
            tensor = found[str(value.name)].tensor_type if str(value.name) in found else None
            if tensor is None or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                raise ConfigError(
                    f"the size of {value.name} (node {node.name}, {node.op_type}) depends on the image, so the graph's "
                    "memory cannot be planned: export without nms=True"
                )
            self._set(value, tuple(dim.dim_value for dim in tensor.shape.dim), ir.DataType(tensor.elem_type))


class Sizes:
    """Every tensor's shape at the smallest and at the largest inputs of a graph, by tensor name.

    Args:
        model: The graph.
        least: Input name → smallest shape.
        most: Input name → largest shape.
        shapes: Shapes of the graph at `most`, if they are known already.
    """

    def __init__(
        self,
        model: ir.Model,
        least: Mapping[str, Sequence[int]],
        most: Mapping[str, Sequence[int]],
        shapes: Shapes | None = None,
    ) -> None:
        self.shapes = Shapes(model, most) if shapes is None else shapes
        self.most = _by_name(self.shapes)
        self.least = self.most if least == most else _by_name(Shapes(model, least))

    def fixed(self, value: ir.Value, axis: int) -> int | None:
        """Return the length of an axis if it is the same at all sizes, else None."""
        least, most = self.least[str(value.name)][axis], self.most[str(value.name)][axis]
        return most if least == most else None

    def count(self, value: ir.Value) -> int:
        """Return the elements of a tensor at the largest size."""
        return int(np.prod(self.most[str(value.name)], dtype=np.int64))


def _by_name(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {str(value.name): shape for value, shape in shapes.items()}


def _fixed_shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static():
        raise ConfigError(f"the input {value.name} has axes of any length: say how long they are at most")
    return tuple(value.shape.numpy())
