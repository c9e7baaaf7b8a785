"""Operators that only pick elements: run on positions, they say where each element came from."""

from __future__ import annotations

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attributes


def picked_from(op: Ops, node: ir.Node, dy: Value) -> Value:
    """dx of a node that picks elements of its first input: dy added up where they were.

    Works for any operator that moves int64 as it moves floats, whatever its other inputs are.
    """
    x, *rest = node.inputs
    positions = op.Reshape(op.Range(op.scalar(0), op.Size(x), op.scalar(1)), op.Shape(x))
    return add_at(op, x, op.call(node.op_type, positions, *rest, **attributes(node)), dy)


def add_at(op: Ops, x: Value, positions: Value, dy: Value) -> Value:
    """Zeros of x's shape with dy added at flat positions; both may be of any shape."""
    zeros = op.Expand(0.0, op.Unsqueeze(op.Size(x), op.ints([0])))
    flat = (op.reshape(v, [-1]) for v in (positions, dy))
    return op.reshape_like(op.ScatterElements(zeros, *flat, axis=0, reduction="add"), x)
