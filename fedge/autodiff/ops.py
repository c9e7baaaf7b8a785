"""Writing ONNX nodes the way one writes a formula.

``op = Ops(graph, opset)`` appends to ``graph``; ``op.Mul(x, 2.0)`` is a node and returns its
output. Python numbers and NumPy arrays become shared initializers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from fedge.errors import ArtifactError, UnsupportedOperatorError
from fedge.types import Array

Value: TypeAlias = ir.Value
Dim: TypeAlias = int | str
Operand: TypeAlias = Value | Array | float | None


def shape_of(value: Value) -> tuple[Dim, ...]:
    """The shape of a value of the forward graph; a string is a dimension that grows with the batch.

    Raises:
        ArtifactError: If shape inference could not find it.
    """
    if value.shape is None:
        raise ArtifactError(
            f"shape inference finds no shape for {value.name!r}; "
            "export the model with fixed sizes in all dimensions but the first"
        )
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


def static_shape(value: Value) -> tuple[int, ...]:
    """Like :func:`shape_of`, for values whose size does not depend on the batch."""
    return static_dims(value, slice(None))


def static_dims(value: Value, dims: slice) -> tuple[int, ...]:
    """The chosen dimensions, which must not depend on the batch.

    Raises:
        ArtifactError: If one does.
    """
    sizes = tuple(d for d in shape_of(value)[dims] if isinstance(d, int))
    if len(sizes) != len(shape_of(value)[dims]):
        raise ArtifactError(f"{value.name!r} has shape {shape_of(value)}; only the first may vary")
    return sizes


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:  # noqa: ANN401 - any attribute
    """A node's attribute as a Python value, or the default."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return found.as_string() if found.type == ir.AttributeType.STRING else found.value


def attributes(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as Python values, to write another node with."""
    return {name: attribute(node, name) for name in node.attributes}


def constant(node: ir.Node, index: int) -> Array:
    """The value of an input that must not depend on the data.

    Raises:
        UnsupportedOperatorError: If it does.
    """
    tensor = ir.convenience.get_const_tensor(node.inputs[index])
    if tensor is None:
        raise UnsupportedOperatorError(
            f"node {node.name or node.outputs[0].name!r} ({node.op_type}) computes its input "
            f"{node.inputs[index].name!r}; fedge differentiates it where that is a constant"
        )
    return np.asarray(tensor.numpy())


class Ops:
    """Appends nodes to a graph.

    Attributes:
        graph: Where nodes go.
        opset: Version of the standard operators the graph uses.
    """

    def __init__(self, graph: ir.Graph, opset: int) -> None:
        self.graph = graph
        self.opset = opset
        self._consts: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._made = 0

    def __getattr__(self, op_type: str) -> Any:  # noqa: ANN401 - a callable per operator
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return partial(self.call, op_type)

    def call(self, op_type: str, *inputs: Operand, outputs: int = 1, **attributes: Any) -> Any:  # noqa: ANN401 - one value or several
        """Append one node; returns its output, or a tuple of them when ``outputs`` > 1."""
        node = ir.node(
            op_type,
            [self.value(x) for x in inputs],
            attributes,
            num_outputs=outputs,
            name=self._name(op_type),
        )
        for value in node.outputs:
            value.name = self._name(op_type)
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def value(self, x: Operand) -> Value | None:
        """``x`` itself, or the shared constant that holds it (floats become float32)."""
        if x is None or isinstance(x, ir.Value):
            return x
        return self.const(np.asarray(x, np.float32) if isinstance(x, (int, float)) else x)

    def const(self, array: Array) -> Value:
        """An initializer with these contents, made once per graph."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._consts:
            name = self._name("const")
            tensor = ir.tensor(np.array(array), name=name)
            value = ir.val(name, shape=tensor.shape, dtype=tensor.dtype, const_value=tensor)
            self.graph.register_initializer(value)
            self._consts[key] = value
        return self._consts[key]

    def ints(self, values: Sequence[int]) -> Value:
        """An int64 vector, as axes and shapes are given."""
        return self.const(np.asarray(values, np.int64))

    def scalar(self, value: int) -> Value:
        """An int64 of rank 0."""
        return self.const(np.asarray(value, np.int64))

    def sum(self, x: Value, axes: Sequence[int], keepdims: bool = False) -> Value:
        """Sum over ``axes``; ``x`` itself when there are none."""
        if not axes:
            return x
        return self.ReduceSum(x, self.ints(axes), keepdims=int(keepdims))

    def mean(self, x: Value, axes: Sequence[int] | None = None) -> Value:
        """Mean over ``axes``, which stay with size 1; over all elements (rank 0) by default."""
        if axes is None:
            return self.ReduceMean(x, keepdims=0)
        if self.opset >= 18:
            return self.ReduceMean(x, self.ints(axes), keepdims=1)
        return self.ReduceMean(x, axes=list(axes), keepdims=1)

    def size(self, x: Value) -> Value:
        """The number of elements as float32, rank 0."""
        return self.Cast(self.Size(x), to=int(ir.DataType.FLOAT))

    def pieces(
        self, x: Value, count: int, axis: int = 0, shape: Sequence[Dim] = ()
    ) -> tuple[Value, ...]:
        """``x`` cut into equal pieces along ``axis``.

        ``shape`` is theirs: ONNX Runtime's plan of memory takes time quadratic in the number of
        values whose sizes it cannot find (2.2 s instead of 0.05 s for 1500).
        """
        if count == 1:
            return (x,)
        number = {"num_outputs": count} if self.opset >= 18 else {}
        found = tuple(self.Split(x, axis=axis, outputs=count, **number))
        for value in found if shape else ():
            value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
        return found

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """Transpose, unless the order stays."""
        return x if list(perm) == sorted(perm) else self.Transpose(x, perm=list(perm))

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """Reshape to a shape in which at most one dimension depends on the batch."""
        return self.Reshape(x, self.ints([d if isinstance(d, int) else -1 for d in shape]))

    def reshape_like(self, x: Value, like: Value) -> Value:
        """Reshape ``x`` to the shape of the forward value ``like``."""
        shape = shape_of(like)
        if sum(isinstance(d, str) for d in shape) > 1:
            return self.Reshape(x, self.Shape(like))
        return self.reshape(x, shape)

    def unbroadcast(self, grad: Value, out: Value, operand: Value) -> Value:
        """Sum a gradient of ``out``'s shape down to the shape of a broadcast operand."""
        return self.sum_to(grad, shape_of(out), shape_of(operand))

    def sum_to(self, grad: Value, have: Sequence[Dim], want: Sequence[Dim]) -> Value:
        """Sum ``grad`` of shape ``have`` down to ``want``, which broadcasts to it."""
        lead = len(have) - len(want)
        inner = [lead + i for i, d in enumerate(want) if d == 1 and have[lead + i] != 1]
        if not inner:
            return self.sum(grad, range(lead))
        summed = self.sum(grad, [*range(lead), *inner], keepdims=True)
        return self.Squeeze(summed, self.ints(range(lead))) if lead else summed

    def _name(self, op_type: str) -> str:
        self._made += 1
        return f"{op_type}@{self._made}"
