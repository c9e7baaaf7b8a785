"""Operators that pick elements: by position, by index or by size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, constant, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.errors import UnsupportedOperatorError


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
    """dy added up per index; for axis 0, which embeddings use.

    Raises:
        UnsupportedOperatorError: For another axis, unless it picks by constants.
    """
    x, indices = node.inputs
    axis = attribute(node, "axis", 0) % len(shape_of(x))
    if axis:
        return _gather_constant(op, node, dy, axis)
    zeros = op.Expand(0.0, op.Shape(x))
    places = op.Unsqueeze(op.Cast(indices, to=int(ir.DataType.INT64)), op.ints([-1]))
    return op.ScatterND(zeros, places, dy, reduction="add")


def _gather_constant(op: Ops, node: ir.Node, dy: Value, axis: int) -> Value:
    """Indices are constant: dy times the matrix that put them in place."""
    x = node.inputs[0]
    size = shape_of(x)[axis]
    picked = constant(node, 1)
    if not isinstance(size, int):
        raise UnsupportedOperatorError(f"node {node.name!r} gathers from the batch along {axis}")
    one_hot = np.eye(size, dtype=np.float32)[np.atleast_1d(picked).reshape(-1)]
    shape = shape_of(x)
    rows = op.reshape(dy, (*shape[:axis], len(one_hot), *shape[axis + 1 :]))
    order = [i for i in range(len(shape)) if i != axis] + [axis]
    spread = op.MatMul(op.transpose(rows, order), one_hot)
    return op.transpose(spread, [int(i) for i in np.argsort(order)])


@vjp_rule("Slice")
def slice_(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy surrounded by zeros; bounds are constant, steps 1.

    Raises:
        UnsupportedOperatorError: For other steps, or along the batch.
    """
    shape = shape_of(node.inputs[0])
    starts, stops = (constant(node, i).tolist() for i in (1, 2))
    axes = constant(node, 3).tolist() if len(node.inputs) > 3 else list(range(len(starts)))
    steps = constant(node, 4).tolist() if len(node.inputs) > 4 else [1] * len(starts)
    before, after = [0] * len(shape), [0] * len(shape)
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        size = shape[axis]
        if step != 1 or not isinstance(size, int):
            raise UnsupportedOperatorError(
                f"node {node.name!r} is a Slice with step {step} along size {size}; fedge "
                "differentiates slices with step 1 of fixed dimensions"
            )
        first, last, _ = slice(start, stop).indices(size)
        before[axis], after[axis] = first, size - max(last, first)
    return op.Pad(dy, op.ints([*before, *after]))


@vjp_rule("Pad")
def pad(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Cut off what was added (and the reverse, where padding was negative).

    Raises:
        UnsupportedOperatorError: Unless the padding is constant.
    """
    mode = attribute(node, "mode", "constant")
    if mode != "constant" or len(node.inputs) > 3:
        raise UnsupportedOperatorError(
            f"node {node.name!r} is a Pad in mode {mode}; fedge differentiates constant padding "
            "of all axes"
        )
    return op.Pad(dy, op.ints([-p for p in constant(node, 1).tolist()]))


def _hit(op: Ops, x: Value, y: Value) -> Value:
    return op.Cast(op.Equal(x, y), to=int(ir.DataType.FLOAT))
