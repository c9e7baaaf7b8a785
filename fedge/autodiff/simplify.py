"""What a graph computes from constants and sizes alone is computed here, once.

Exporters that fold no weights fold nothing else either: a Reshape's target arrives as a chain of
Shape, Gather and Concat, a Resize's as more. Params are initializers and are never folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedge.autodiff.shapes import Known, Sizes, trace_twice
from fedge.types import Array

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def simplify(model: onnx.ModelProto, sizes: Sizes | None = None) -> onnx.ModelProto:
    """A copy of ``model`` without what does not depend on inputs or float initializers.

    Args:
        model: As for :func:`~fedge.autodiff.shapes.infer_shapes`.
        sizes: Likewise.

    Raises:
        ArtifactError: Likewise.
    """
    few, many, _ = trace_twice(model, sizes)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    trained = {t.name for t in copy.graph.initializer if t.data_type in _FLOATS}
    for node in copy.graph.node:
        if node.op_type not in ("Shape", "Size") and trained.intersection(node.input):
            trained.update(node.output)
        elif node.op_type != "Constant" and all(_same(few, many, n) for n in node.output if n):
            nodes += [_constant(n, few.values[n]) for n in node.output if n]
            continue
        if node.op_type == "CastLike" and node.input[1] in few.types:
            node.CopyFrom(_cast(node, few.types[node.input[1]].tensor_type.elem_type))
        if node.op_type == "Reshape" and not _same(few, many, node.input[1]):
            nodes += _target(node, few, many)
        nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(_alive(nodes, [o.name for o in copy.graph.output]))
    return copy


def _same(few: Known, many: Known, name: str) -> bool:
    if name not in few.values or name not in many.values:
        return False
    a, b = few.values[name], many.values[name]
    return bool(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=True))


def _constant(name: str, value: Array) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape))
    return helper.make_node("Constant", [], [name], name=f"{name}/folded", value=tensor)


def _cast(node: onnx.NodeProto, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", node.input[:1], node.output, name=node.name, to=to)


def _target(node: onnx.NodeProto, few: Known, many: Known) -> list[onnx.NodeProto]:
    """A Reshape's target in which one size depends on the data's, as a constant with −1 there."""
    a, b = (k.values.get(node.input[1]) for k in (few, many))
    if a is None or b is None or a.shape != b.shape or np.sum(a != b) != 1 or -1 in a:
        return []
    name = f"{node.output[0]}/target"
    node.input[1] = name
    return [_constant(name, np.where(a == b, a, -1))]


def _alive(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    needed, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            kept.append(node)
    return kept[::-1]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names of its inputs and of all that the graphs it carries use."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)
        yield from (value.name for value in attribute.g.output)
