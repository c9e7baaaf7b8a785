"""Sums, means and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from fedge.autodiff.ops import Dim, Ops, Value, attribute, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.errors import UnsupportedOperatorError


@vjp_rule("ReduceSum")
def reduce_sum(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy repeated along the summed axes."""
    return _spread(op, node, dy)


@vjp_rule("ReduceMean")
def reduce_mean(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy / count repeated along the averaged axes."""
    sizes = [shape_of(node.inputs[0])[i] for i in _axes(node)]
    static = [d for d in sizes if isinstance(d, int)]
    if len(static) == len(sizes):
        return _spread(op, node, op.Mul(dy, 1.0 / math.prod(static)))
    count = op.Div(op.size(node.inputs[0]), op.size(node.outputs[0]))
    return _spread(op, node, op.Div(dy, count))


@vjp_rule("Softmax")
def softmax(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """s (dy − Σ dy s)."""
    s, axis = node.outputs[0], attribute(node, "axis", -1)
    return op.Mul(s, op.Sub(dy, op.sum(op.Mul(dy, s), [axis], keepdims=True)))


@vjp_rule("LogSoftmax")
def log_softmax(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """dy − eʸ Σ dy."""
    y, axis = node.outputs[0], attribute(node, "axis", -1)
    return op.Sub(dy, op.Mul(op.Exp(y), op.sum(dy, [axis], keepdims=True)))


def _spread(op: Ops, node: ir.Node, dy: Value) -> Value:
    """Repeat a reduced gradient along the reduced axes."""
    x = node.inputs[0]
    axes = _axes(node)
    if axes and not attribute(node, "keepdims", 1):
        dy = op.Unsqueeze(dy, op.ints(axes))
    return op.Expand(dy, _shape(op, x, shape_of(x))) if axes else dy


def _shape(op: Ops, x: Value, shape: Sequence[Dim]) -> Value:
    static = [d for d in shape if isinstance(d, int)]
    return op.ints(static) if len(static) == len(shape) else op.Shape(x)


def _axes(node: ir.Node) -> list[int]:
    """The reduced axes, non-negative and sorted; given as attribute or as constant input."""
    rank = len(shape_of(node.inputs[0]))
    axes = attribute(node, "axes")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        constant = ir.convenience.get_const_tensor(given)
        if constant is None:
            raise UnsupportedOperatorError(
                f"node {node.name!r} ({node.op_type}) computes its axes; give them as a constant"
            )
        axes = constant.numpy().tolist()
    if not axes:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in axes)
