"""Operators that pick elements: by position, by index or by size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, constant, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.positions import picked_from
from fedge.types import Array


@vjp_rule("Max", "Min")
def extreme(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy is shared by the inputs that reach the extreme."""
    y = node.outputs[0]
    hits = [_hit(op, x, y) for x in node.inputs]
    part = op.Div(dy, op.Sum(*hits)) if len(hits) > 1 else dy
    return tuple(
        op.unbroadcast(op.Mul(part, hit), y, x) for x, hit in zip(node.inputs, hits, strict=True)
    )


@vjp_rule("Gather")
def gather(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy added up per index."""
    x, indices = node.inputs
    axis = attribute(node, "axis", 0) % len(shape_of(x))
    if axis:
        size = shape_of(x)[axis]
        if indices.const_value is None or not isinstance(size, int):
            return picked_from(op, node, dy)
        one_hot = np.eye(size, dtype=np.float32)[constant(node, 1).reshape(-1)]
        return _gather_constant(op, node, dy, one_hot)
    zeros = op.Expand(0.0, op.Shape(x))
    places = op.Unsqueeze(op.Cast(indices, to=int(ir.DataType.INT64)), op.ints([-1]))
    return op.ScatterND(zeros, places, dy, reduction="add")


def _gather_constant(op: Ops, node: ir.Node, dy: Value, one_hot: Array) -> Value:
    """Indices are constant: dy times the matrix that put them in place."""
    shape = shape_of(node.inputs[0])
    axis = attribute(node, "axis") % len(shape)
    rows = op.reshape(dy, (*shape[:axis], len(one_hot), *shape[axis + 1 :]))
    order = [i for i in range(len(shape)) if i != axis] + [axis]
    spread = op.MatMul(op.transpose(rows, order), one_hot)
    return op.transpose(spread, [int(i) for i in np.argsort(order)])


@vjp_rule("Slice")
def slice_(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy surrounded by zeros; unless bounds are constant and steps 1, put where it came from."""
    shape = shape_of(node.inputs[0])
    if any(v is not None and v.const_value is None for v in node.inputs[1:]):
        return picked_from(op, node, dy)
    starts, stops = (constant(node, i).tolist() for i in (1, 2))
    axes = constant(node, 3).tolist() if _has(node, 3) else list(range(len(starts)))
    steps = constant(node, 4).tolist() if _has(node, 4) else [1] * len(starts)
    before, after = [0] * len(shape), [0] * len(shape)
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        size = shape[axis]
        if step != 1 or not isinstance(size, int):
            return picked_from(op, node, dy)
        first, last, _ = slice(start, stop).indices(size)
        before[axis], after[axis] = first, size - max(last, first)
    return op.Pad(dy, op.ints([*before, *after]))


@vjp_rule("Pad")
def pad(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Cut off what was added (and the reverse, where padding was negative).

    In modes other than constant, what was copied outwards is added to where it came from.
    """
    if attribute(node, "mode", "constant") != "constant":
        return picked_from(op, node, dy)
    pads = node.inputs[1]
    back = op.ints([-p for p in constant(node, 1).tolist()]) if pads.const_value else op.Neg(pads)
    return op.Pad(dy, back, None, node.inputs[3]) if _has(node, 3) else op.Pad(dy, back)


def _has(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _hit(op: Ops, x: Value, y: Value) -> Value:
    return op.Cast(op.Equal(x, y), to=int(ir.DataType.FLOAT))
